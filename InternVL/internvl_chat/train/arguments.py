"""The command line of training: every flag of the reference recipe, and transformers' own.

All mistakes are reported at once, before anything is loaded.
"""

import argparse
import difflib
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from internvl_chat.data.bad_records import POLICIES
from internvl_chat.data.order import STRATEGIES
from internvl_chat.data.template import SYSTEM_TEXTS
from internvl_chat.data.tiling import NORMALIZATIONS
from internvl_chat.model.attention import ATTENTION_NAMES
from internvl_chat.model.loss import LOSS_REDUCTIONS
from internvl_chat.train.optim.adamw import WEIGHT_PRECISIONS
from internvl_chat.utils.errors import UsageError


def _arg(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """Return a dataclass field with its help text."""
    metadata: dict[str, Any] = {"help": text}
    if choices:
        metadata["choices"] = list(choices)
    return field(default=default, metadata=metadata)


@dataclass
class ModelArguments:
    """Which model, and which of its parts are trained."""

    model_name_or_path: str | None = _arg(None, "Model folder, adapter folder or hub id to start from.")
    base_model_path: str | None = _arg(None, "Where the base of the adapters to start from is now.")
    vision_path: str | None = _arg(None, "InternViT folder, to assemble a model from its parts.")
    llm_path: str | None = _arg(None, "Language-model folder, to assemble a model from its parts.")
    mlp_path: str | None = _arg(
        None, "Weight file of the projector (mlp1), for a model assembled from its parts."
    )
    freeze_llm: bool = _arg(False, "Do not train the language model.")
    freeze_backbone: bool = _arg(False, "Do not train the vision tower.")
    freeze_mlp: bool = _arg(False, "Do not train the projector.")
    unfreeze_vit_layers: int = _arg(0, "Train the vision blocks from this one on (negative from the end).")
    unfreeze_lm_head: bool = _arg(False, "Train the head although the language model is frozen.")
    vision_select_layer: int = _arg(-1, "Vision layer whose output is used; -1 is the last.")
    use_backbone_lora: int = _arg(0, "LoRA rank in the vision tower; 0 for none. Alpha is twice the rank.")
    use_llm_lora: int = _arg(0, "LoRA rank in the language model; 0 for none. Alpha is twice the rank.")
    lora_dropout: float = _arg(0.05, "Dropout before the adapters.")
    grad_checkpoint: str = _arg(
        "auto",
        "Recompute activations in the backward pass: True, False, or in as many layers as memory needs.",
    )
    drop_path_rate: float = _arg(0.0, "Stochastic depth of the vision tower.")
    ps_version: str = _arg("v2", "Version of the pixel shuffle.", ("v1", "v2"))
    use_fast_tokenizer: bool = _arg(False, "Accepted for the reference; both tokenizers give the same ids.")
    attn: str = _arg("auto", "Attention of both towers.", ATTENTION_NAMES)
    use_liger: bool = _arg(False, "Use Liger's kernels for RMSNorm, SwiGLU and RoPE (NVIDIA GPUs).")

    def __post_init__(self) -> None:
        self.grad_checkpoint = _three_way("grad_checkpoint", self.grad_checkpoint)


@dataclass
class DataArguments:
    """Which data, and how text and images become tokens."""

    meta_path: str | None = _arg(None, "The meta file (PMC-data.json): which data sets there are.")
    eval_meta_path: str | None = _arg(
        None, "A meta file of held-out data sets; see --eval_strategy and --eval_steps."
    )
    data_root: str | None = _arg(None, "Folder that relative paths in the meta file count from [repository].")
    conv_style: str = _arg("internvl2_5", "Conversation style.", tuple(SYSTEM_TEXTS))
    max_seq_length: int = _arg(8192, "Most tokens of a record; a longer one loses tiles, never image tokens.")
    force_image_size: int = _arg(448, "Side of a tile in pixels.")
    down_sample_ratio: float = _arg(0.5, "Down-sampling of the pixel shuffle; must be the model's.")
    pad2square: bool = _arg(False, "Pad an image of one tile to a square instead of squeezing it.")
    dynamic_image_size: bool = _arg(False, "Cut images into tiles by their aspect ratio.")
    use_thumbnail: bool = _arg(False, "Append the whole image to its tiles.")
    min_dynamic_patch: int = _arg(1, "Fewest tiles of an image.")
    max_dynamic_patch: int = _arg(12, "Most tiles of a record; a data set's own limit wins.")
    normalize_type: str = _arg("imagenet", "Pixel statistics.", tuple(NORMALIZATIONS))
    use_data_resampling: bool = _arg(False, "Draw from the data sets by the square roots of their sizes.")
    check: str = _arg(
        "fast",
        "Before weights are loaded: full decodes every image, fast reads its header and end; off looks for "
        "no duplicates.",
        ("full", "fast", "off"),
    )
    on_bad_record: str = _arg(
        "fail", "What to do with a record that cannot be used; skip leaves it out, by name.", POLICIES
    )
    max_bad_fraction: float = _arg(0.01, "Most records that --on_bad_record skip may leave out, as a share.")
    truncate_text: bool = _arg(
        False, "Cut the end of a text that is too long even with one tile an image, instead of refusing it."
    )

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"--max_bad_fraction {self.max_bad_fraction} must be from 0 to 1")


@dataclass
class RunArguments(TrainingArguments):
    """transformers' training arguments, with those of the reference that transformers 5 has dropped."""

    evaluation_strategy: str | None = _arg(None, "Former name of eval_strategy.")
    overwrite_output_dir: bool = _arg(False, "Delete what an earlier run left in output_dir.")
    warmup_ratio: float = _arg(0.0, "Share of the steps over which the learning rate rises.")
    do_train: bool = _arg(True, "Train; there is nothing else that this script does.")
    group_by_length: bool = _arg(False, "Accepted for the reference; steps are always dealt by cost.")
    loss_reduction: str = _arg("sample", "What weighs the same in a step.", LOSS_REDUCTIONS)
    train_sampling_strategy: str = _arg("random", "Order of the records.", STRATEGIES)
    fsdp: str = _arg(
        "",
        "full_shard spreads weights and all that belongs to them over the GPUs (FSDP2).",
        ("", "full_shard"),
    )
    packing: bool = _arg(
        True, "Put the records of a process's share of a step behind one another; changes no result."
    )
    max_packed_tokens: int = _arg(16384, "Most tokens of a packed forward pass.")
    weight_precision: str = _arg(
        "auto",
        "How bf16 weights are stepped: with float32 masters, with stochastic rounding, or as the reference "
        "does; auto takes masters where they fit, else stochastic.",
        WEIGHT_PRECISIONS,
    )

    self_test: bool = _arg(
        False, "Before training, show what is learnt and compare packed with single records (seconds)."
    )
    max_bad_steps: int = _arg(
        5, "Leave out so many steps whose loss or gradient is no number; the next one ends the run."
    )
    hang_seconds: float = _arg(
        1800.0, "After so many seconds without a step, print what each process does; 0 never."
    )

    eval_generate: int = _arg(
        0, "In each validation also answer so many questions of each held-out set (exact match, ROUGE-L)."
    )
    early_stopping_patience: int = _arg(
        0, "End the run after so many validations in a row without a new best; 0 never."
    )

    def __post_init__(self) -> None:
        if self.evaluation_strategy is not None and self.eval_strategy == "no":
            self.eval_strategy = self.evaluation_strategy
        if self.eval_steps is None:
            self.eval_steps = self.save_steps
        # Our checkpoints are loaded, and the best of them kept, in our own way.
        self.ends_with_best, self.load_best_model_at_end = self.load_best_model_at_end, False
        chooses = self.ends_with_best or self.early_stopping_patience or self.save_strategy == "best"
        if chooses and self.metric_for_best_model is None:
            self.metric_for_best_model = "eval_loss"
        if self.warmup_ratio:
            self.warmup_steps = self.warmup_ratio
        self.remove_unused_columns = False
        if self.use_cpu and self.ddp_backend is None and "WORLD_SIZE" in os.environ:
            self.ddp_backend = "gloo"
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False
        if self.ddp_broadcast_buffers is None:
            self.ddp_broadcast_buffers = False
        # Our collator makes a whole optimizer step of the process's records, so that for transformers a
        # batch is a step; the records of a forward pass and of the share are kept here.
        self.records_per_pack = self.per_device_train_batch_size
        self.share_of_step = self.per_device_train_batch_size * self.gradient_accumulation_steps
        self.per_device_train_batch_size, self.gradient_accumulation_steps = self.share_of_step, 1
        # Blocks are compiled, and layers spread, one by one; transformers would take the model as a whole.
        self.compile_blocks, self.torch_compile = self.torch_compile, False
        self.sharded, self.fsdp = bool(self.fsdp), None
        super().__post_init__()
        # One process uses one GPU; without torchrun, transformers would spread the model over all it sees.
        self._n_gpu = min(self.n_gpu, 1)

    @property
    def processes_here(self) -> int:
        """Processes of the run on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    @property
    def step_records(self) -> int:
        """Records of an optimizer step over all processes."""
        return self.share_of_step * self.world_size

    def count_steps(self, epoch_steps: int) -> int:
        """Return the optimizer steps of the whole run, given those of an epoch."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * epoch_steps)


@dataclass
class Arguments:
    """All arguments of a training run."""

    model: ModelArguments
    data: DataArguments
    run: RunArguments

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved arguments without secrets, for the run's `config.yaml`."""
        run = self.run.to_dict()
        run["per_device_train_batch_size"] = self.run.records_per_pack
        run["load_best_model_at_end"] = self.run.ends_with_best
        run["torch_compile"] = self.run.compile_blocks
        run["fsdp"] = "full_shard" if self.run.sharded else None
        run["gradient_accumulation_steps"] = self.run.share_of_step // self.run.records_per_pack
        run = {k: v for k, v in run.items() if not re.search(r"token$|secret|password", k)}
        return {"model": vars(self.model), "data": vars(self.data), "training": run}


class _Parser(HfArgumentParser):
    """A parser that raises instead of leaving the program."""

    def error(self, message: str) -> None:
        raise UsageError(message)


def _three_way(flag: str, value: str) -> str:
    """Return `auto`, `True` or `False`, however it was written."""
    known = (
        {"auto": "auto"}
        | dict.fromkeys(("true", "1", "yes"), "True")
        | dict.fromkeys(("false", "0", "no"), "False")
    )
    if str(value).lower() not in known:
        raise ValueError(f"--{flag} {value}: must be auto, True or False")
    return known[str(value).lower()]


def build_parser() -> HfArgumentParser:
    """Return the parser of the training command."""
    return _Parser(
        (ModelArguments, DataArguments, RunArguments),
        prog="internvl_chat_finetune",
        description="Fine-tune InternVL3. Give flags, or one JSON or YAML file with the same names.",
        epilog="Example: torchrun -m internvl_chat.train.internvl_chat_finetune --model_name_or_path MODEL "
        "--meta_path PMC-data.json --output_dir work_dirs/run --use_llm_lora 16 --freeze_llm True "
        "--freeze_mlp True --freeze_backbone True --bf16 True",
        allow_abbrev=False,
        exit_on_error=False,
    )


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Parse flags, or one configuration file.

    Raises:
        UsageError: lists every unknown flag and every bad value.
    """
    tokens = list(sys.argv[1:] if argv is None else argv)
    if len(tokens) == 1 and tokens[0].endswith((".json", ".yaml", ".yml")):
        tokens = _tokens_from_file(Path(tokens[0]))
    parser = build_parser()
    problems: list[str] = []
    while True:
        try:
            _, unknown = parser.parse_known_args(tokens)
            break
        except argparse.ArgumentError as error:
            flag = error.argument_name.split("/")[0] if error.argument_name else None
            problems.append(f"{flag}: {error.message}")
            tokens = _without(tokens, flag)
    problems += _unknown_flags(unknown, parser)
    problems += _missing(tokens)
    if problems:
        raise UsageError(problems)
    try:
        parsed = parser.parse_args_into_dataclasses(args=tokens, look_for_args_file=False)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise UsageError(str(error)) from None
    return Arguments(*parsed)


def _missing(tokens: list[str]) -> list[str]:
    """Name the required flags that are absent."""
    given = {token.partition("=")[0].replace("-", "_") for token in tokens if token.startswith("--")}
    problems = [f"--{name} is required" for name in ("output_dir", "meta_path") if f"__{name}" not in given]
    if not given & {"__model_name_or_path"} and not given >= {"__vision_path", "__llm_path"}:
        problems.append("--model_name_or_path is required (or --vision_path with --llm_path)")
    return problems


def _unknown_flags(unknown: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Name each unknown flag with the nearest known one."""
    known = [name for action in parser._actions for name in action.option_strings]
    problems = []
    for token in unknown:
        if token.startswith("--"):
            name = token.partition("=")[0]
            near = difflib.get_close_matches(name, known, n=1)
            problems.append(f"unknown flag {name}" + (f"; did you mean {near[0]}?" if near else ""))
    return problems or [f"unexpected argument {token!r}" for token in unknown]


def _without(tokens: list[str], flag: str | None) -> list[str]:
    """Remove a flag and its values."""
    if flag is None:
        return []
    kept, skipping = [], False
    for token in tokens:
        if token.startswith("--"):
            skipping = token.partition("=")[0].replace("-", "_") == flag.replace("-", "_")
        if not skipping:
            kept.append(token)
    return kept


def _tokens_from_file(path: Path) -> list[str]:
    """Return the flags that a JSON or YAML file of names and values stands for.

    The `config.yaml` of a run, in which they are grouped, is accepted too.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such configuration file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid JSON or YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise UsageError(f"{path}: must map flag names to values")
    tokens = []
    for name, value in loaded.items():
        if name in ("model", "data", "training") and isinstance(value, dict):
            tokens += _flags(value)
        else:
            tokens += _flags({name: value})
    return tokens


def _flags(values: dict[str, Any]) -> list[str]:
    """Return names and values as command-line tokens; None means not given."""
    tokens = []
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, list):
            tokens += [f"--{name}", *map(str, value)] if value else []
        else:
            tokens += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return tokens
