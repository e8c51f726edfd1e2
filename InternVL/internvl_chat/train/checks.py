"""Check the flags, model, data and output folder before reading weights; report all problems together."""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.utils import is_liger_kernel_available

from internvl_chat.constants import MAX_TILES
from internvl_chat.data.encode.tokenizer import load_tokenizer
from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.data.sources.meta import DatasetSpec, load_meta
from internvl_chat.data.storage.stores import open_root
from internvl_chat.model.attention import resolve_attention
from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.io.adapter import find_base, read_base
from internvl_chat.model.io.checkpoint import model_weights
from internvl_chat.model.io.folders import is_adapter, model_folder, read_config, read_json
from internvl_chat.model.io.weights import weight_files
from internvl_chat.model.lora.injection import ranks_of, read_adapter_config
from internvl_chat.model.lora.quantization import MISSING
from internvl_chat.train.checkpoint.fingerprint import (
    EXCLUDED,
    TOTAL_STEPS,
    DataState,
    fingerprint,
    fingerprint_run,
    read_fingerprint,
)
from internvl_chat.train.checkpoint.resume_changes import check_resume
from internvl_chat.train.checkpoint.run_folder import (
    PARTIAL,
    OutputFolder,
    checkpoint_step,
    inspect_output_folder,
    list_checkpoints,
)
from internvl_chat.train.checkpoint.state import STATE_FILE
from internvl_chat.train.config import RunConfig, TrainConfig
from internvl_chat.train.distributed.deepspeed import deepspeed_problems, offloads, zero_stage
from internvl_chat.train.distributed.signals import note_start
from internvl_chat.train.flags import FSDP_MODES
from internvl_chat.train.monitor.trackers import tracker_problems
from internvl_chat.train.optim.factory import (
    OWN_OPTIMIZERS,
    flags_without_effect,
    optimizer_problems,
    scheduled_rate,
)
from internvl_chat.train.optim.parameter_groups import rate_problems
from internvl_chat.train.validation import metric_names, validation_specs
from internvl_chat.utils import distributed
from internvl_chat.utils.errors import DataError, M3LLMError, ModelError, UsageError, format_problems
from internvl_chat.utils.logging import get_logger
from internvl_chat.utils.paths import data_root

logger = get_logger(__name__)

# Values of `--optim` that support CPU offload.
_CPU_OPTIMIZERS = (*OWN_OPTIMIZERS, "adafactor", "adagrad", "rmsprop", "sgd")


@dataclass(frozen=True)
class RunPlan:
    """Configuration, folders and datasets of a run that has passed all checks.

    Attributes:
        output: output folder and, when resuming, the checkpoint to resume from.
        source: folder of the initial model or, when resuming, of the checkpoint.
        attn: attention kernel to use.
    """

    config: TrainConfig
    output: OutputFolder
    source: Path
    specs: list[DatasetSpec]
    eval_specs: list[DatasetSpec]
    attn: str


def check_configuration(config: TrainConfig) -> RunPlan:
    """Check everything that can be checked without reading weights.

    Raises:
        UsageError: the flags or the output folder are invalid; the message lists all problems.
        ModelError: the model or the data is invalid, but not the flags; the message lists all problems.
    """
    problems: list[str] = []
    only_files = True
    results: dict[str, Any] = {}
    run = config.run
    checks = {
        "output": lambda: _check_output(config),
        "attn": lambda: resolve_attention(config.model.attn, run.device, run.dtype),
        "specs": lambda: _check_data(config.data.meta_path, config),
        "eval_specs": lambda: _check_data(config.data.eval_meta_path, config, "--eval_meta_path: "),
        "validation": lambda: _raise(_validation_flags(config, results.get("eval_specs"))),
        "changes": lambda: _check_changes(config, results),
        "source": lambda: _check_model(config),
        "flags": lambda: _raise(flag_problems(config)),
    }
    for name, check in checks.items():
        try:
            results[name] = check()
        except M3LLMError as error:
            problems += error.problems if isinstance(error, UsageError) else [str(error)]
            only_files &= not isinstance(error, UsageError)
    if problems and only_files:
        raise ModelError(format_problems(problems))
    _raise(problems)
    for line in results["changes"] if run.is_main else ():
        logger.warning("%s", line)
    if run.save_only_model and run.is_main:
        logger.warning(
            "--save_only_model True: the checkpoints have no optimizer state, so this run cannot be resumed "
            "exactly after an interruption"
        )
    if run.cpu_offload and run.device.type == "cpu" and run.is_main:
        logger.warning("--cpu_offload True: saves no memory, because the run uses the CPU")
    output, source = results["output"], results["output"].resume or results["source"]
    for line in _flag_warnings(config, source) if run.is_main else ():
        logger.warning("%s", line)
    return RunPlan(config, output, source, results["specs"], results["eval_specs"], results["attn"])


def _raise(problems: Iterable[str]) -> None:
    problems = list(problems)
    if problems:
        raise UsageError(problems)


# ---- flags


def flag_problems(config: TrainConfig) -> Iterator[str]:
    """Yield problems with the flags that can be found without the model and the data.

    With `--parallel hsdp`, this is collective: call on all ranks.
    """
    for rule in (_compute_flags, _step_flags, _tile_flags, _trainable_flags):
        yield from rule(config)


def _compute_flags(config: TrainConfig) -> Iterator[str]:
    """Yield problems with the kernel, parallelism, precision, dataloader, optimizer and tracker flags."""
    run, use_liger = config.run, config.model.use_liger
    if use_liger and not is_liger_kernel_available():
        yield "--use_liger True: the package liger-kernel is not installed (pip install liger-kernel)"
    if use_liger and run.device.type != "cuda":
        yield f"--use_liger True: Liger's kernels need an NVIDIA GPU, but this run uses {run.device.type}"
    yield from layout_problems(config)
    if run.deepspeed and find_spec("deepspeed") is None:
        yield "--deepspeed: the package deepspeed is not installed (pip install deepspeed)"
    elif run.deepspeed:
        yield from deepspeed_problems(run)
    if run.dataloader_prefetch_factor and not run.dataloader_num_workers:
        yield f"--dataloader_prefetch_factor {run.dataloader_prefetch_factor} needs --dataloader_num_workers"
    yield from tracker_problems(run.report_to)


def layout_problems(config: TrainConfig) -> Iterator[str]:
    """Yield problems with flags that not every parallel layout supports.

    With `--parallel hsdp`, this is collective: call on all ranks.
    """
    run = config.run
    yield from sharding_problems(run)
    flag = f"--weight_precision {run.weight_precision}"
    if run.weight_precision != "master":
        if run.deepspeed:
            yield f"{flag}: DeepSpeed has its own float32 master weights; remove the flag"
        elif not run.bf16:
            yield f"{flag}: the weights are float32 without --bf16; remove the flag"
        if run.optim not in OWN_OPTIMIZERS:
            yield f"{flag}: --optim {run.optim} updates bf16 weights directly; remove the flag"
    yield from optimizer_problems(run)
    yield from _adapter_flags(config)


def sharding_problems(run: RunConfig) -> Iterator[str]:
    """Yield an error message for each problem with FSDP2, HSDP and CPU offload.

    Collective with `--parallel hsdp`: call on all ranks.
    """
    if run.parallel in FSDP_MODES and run.world_size == 1 and not run.cpu_offload:
        yield f"--parallel {run.parallel}: a single rank has nothing to shard; remove the flag"
    elif run.parallel == "hsdp":
        sizes = set(distributed.all_gather_object(run.local_world_size))
        if len(sizes) > 1:
            found = ", ".join(map(str, sorted(sizes)))
            yield f"--parallel hsdp: all nodes must have the same number of ranks, found {found}; use fsdp"
        elif sizes == {1}:
            yield "--parallel hsdp: with one rank per node, there is nothing to shard in a node; use fsdp"
    config = run.deepspeed or {}
    offload = "--cpu_offload True" if run.cpu_offload else None
    if offloads(config, "optimizer") and "optimizer" not in config:
        offload = '--deepspeed: "zero_optimization.offload_optimizer"'
    if offload and run.optim not in _CPU_OPTIMIZERS:
        names = ", ".join(_CPU_OPTIMIZERS)
        yield f"{offload}: --optim {run.optim} updates weights on GPUs only; use one of {names}"


def _step_flags(config: TrainConfig) -> Iterator[str]:
    """Yield problems with the number of steps and the logging, save and validation intervals."""
    run = config.run
    if not run.flags["do_train"]:
        yield "--do_train False: this script only trains"
    if run.max_steps == 0 or (run.max_steps < 0 and run.num_train_epochs == 0):
        yield "no training steps: --max_steps (or --num_train_epochs) must be greater than 0"
    for flag in ("logging", "save", "eval"):
        value = getattr(run, f"{flag}_steps")
        if getattr(run, f"{flag}_strategy") == "steps" and (
            value == 0 or (value > 1 and value != int(value))
        ):
            yield f"--{flag}_steps {value} must be a positive integer, or a fraction of all steps if below 1"


def _tile_flags(config: TrainConfig) -> Iterator[str]:
    """Yield problems with the tile limits and the paths for assembling a model."""
    model, data = config.model, config.data
    if model.model_name_or_path:
        for flag in ("vision_path", "llm_path", "mlp_path"):
            if value := getattr(model, flag):
                yield f"--{flag} {value}: has no effect with --model_name_or_path; remove one of them"
    elif model.mlp_path and not Path(model.mlp_path).is_file():
        yield f"--mlp_path {model.mlp_path}: no such file"
    min_tiles, max_tiles = data.min_dynamic_patch, data.max_dynamic_patch
    if min_tiles > max_tiles:
        yield f"--min_dynamic_patch {min_tiles} must be at most --max_dynamic_patch {max_tiles}"
    if max_tiles > MAX_TILES:
        yield f"--max_dynamic_patch {max_tiles} must be at most {MAX_TILES}"


def _trainable_flags(config: TrainConfig) -> Iterator[str]:
    """Yield problems with adapters on an assembled model and with flags that freeze everything."""
    model = config.model
    adapters = model.use_llm_lora or model.use_backbone_lora
    if model.model_name_or_path is None and adapters:
        yield (
            "adapters need a base model on disk: first train the model assembled from --vision_path and "
            "--llm_path without adapters, then pass it as --model_name_or_path"
        )
    frozen = model.freeze_llm and model.freeze_mlp and model.freeze_backbone
    if frozen and not (adapters or model.unfreeze_lm_head or model.unfreeze_vit_layers):
        yield "all parameters are frozen; unfreeze a component, or train adapters with --use_llm_lora"


def _adapter_flags(config: TrainConfig) -> Iterator[str]:
    """Yield problems with the flags for LoRA variants, 4-bit weights and learning rates."""
    model, run = config.model, config.run
    if not (model.use_llm_lora or model.use_backbone_lora):
        for flag in ("use_dora", "use_rslora", "load_in_4bit"):
            if getattr(model, flag):
                yield f"--{flag} True: has no effect without adapters; add --use_llm_lora"
    if model.load_in_4bit:
        flag = "--load_in_4bit True"
        if not (model.use_llm_lora or model.freeze_llm):
            yield f"{flag}: 4-bit weights cannot be trained; add --use_llm_lora or --freeze_llm True"
        if run.cpu_offload:
            yield f"{flag}: 4-bit weights cannot be offloaded; remove --cpu_offload True"
        elif run.parallel in FSDP_MODES or (run.deepspeed is not None and zero_stage(run.deepspeed) == 3):
            yield f"{flag}: 4-bit weights cannot be sharded; use --parallel ddp, or ZeRO-1 or 2"
        if find_spec("bitsandbytes") is None:
            yield f"{flag}: {MISSING}"
    yield from rate_problems(config)


def _flag_warnings(config: TrainConfig, source: Path) -> Iterator[str]:
    """Yield warnings about flags without effect, and about a `--max_seq_length` above the model's limit."""
    run, raw = config.run, read_json(source / "config.json") or {}
    if not run.deepspeed:  # a DeepSpeed configuration may define the optimizer and the schedule
        yield from flags_without_effect(run)
    if run.train_sampling_strategy == "group_by_length":
        yield (
            "--train_sampling_strategy group_by_length: the order is the same as with random, because steps "
            "are balanced across ranks by cost"
        )
    llm = raw.get("llm_config") or raw.get("text_config") or raw
    limit, length = llm.get("max_position_embeddings"), config.data.max_seq_length
    if limit and length > limit:
        yield (
            f"--max_seq_length {length}: the language model supports {limit} positions "
            f"(max_position_embeddings in {source / 'config.json'}); longer records may degrade the model"
        )


# ---- validation


def _validation_flags(config: TrainConfig, specs: Sequence[DatasetSpec] | None) -> Iterator[str]:
    """Yield problems with the validation flags; `specs` is None if the validation data is invalid."""
    run = config.run
    if run.eval_strategy == "no":
        values = {
            "eval_meta_path": config.data.eval_meta_path,
            "eval_generate": run.eval_generate,
            "early_stopping_patience": run.early_stopping_patience,
            "load_best_model_at_end": run.load_best_model_at_end,
            "do_eval": run.do_eval,
            "save_strategy": "best" if run.save_strategy == "best" else None,
        }
        given = {flag: value for flag, value in values.items() if value}
        # Some of the flags above set the metric implicitly.
        if not given and run.metric_for_best_model:
            given["metric_for_best_model"] = run.metric_for_best_model
        for flag, value in given.items():
            yield f"--{flag} {value} has no effect without --eval_strategy steps (or epoch)"
        return
    if run.eval_generate > 0:
        zero3 = run.deepspeed is not None and zero_stage(run.deepspeed) == 3
        if run.parallel in FSDP_MODES or zero3:
            yield sharded_generation_problem(run, "ZeRO-3" if zero3 else "FSDP")
        if find_spec("rouge") is None:
            yield f"--eval_generate {run.eval_generate}: rouge is not installed (pip install rouge)"
    if run.metric_for_best_model and specs is not None:
        yield from _metric_problem(run, run.metric_for_best_model, [spec.name for spec in specs])
    if run.load_best_model_at_end and run.save_strategy == "no":
        yield "--load_best_model_at_end True needs checkpoints, but --save_strategy is no"
    if config.data.eval_meta_path is None:
        yield f"--eval_strategy {run.eval_strategy} needs --eval_meta_path"


def sharded_generation_problem(run: RunConfig, sharding: str) -> str:
    """Return the error message for generating answers with sharded weights."""
    return (
        f"--eval_generate {run.eval_generate}: not supported with {sharding}, because sharded weights "
        "require the same number of decoding steps on all ranks; remove the flag, or use --parallel ddp"
    )


def _metric_problem(run: RunConfig, given: str, datasets: Sequence[str]) -> Iterator[str]:
    """Yield a problem if validation does not compute the metric given with `--metric_for_best_model`."""
    losses, all_metrics = (metric_names(datasets, generate=generate) for generate in (False, True))
    metric = f"eval_{given.removeprefix('eval_')}"
    if metric in (all_metrics if run.eval_generate > 0 else losses):
        return
    matches = difflib.get_close_matches(metric, all_metrics, n=1)
    if metric in all_metrics:
        advice = "add --eval_generate"
    else:
        advice = f"did you mean {matches[0]}?" if matches else f"use one of {', '.join(all_metrics)}"
    yield f"--metric_for_best_model {given}: not computed; {advice}"


# ---- output folder, data, model


def _check_output(config: TrainConfig) -> OutputFolder:
    """Inspect the output folder on rank 0; check that all nodes share it."""
    restarted = distributed.any_rank(note_start())
    output = distributed.run_on_rank_0(lambda: _inspect_output(config, restarted))
    if not distributed.is_shared(output.path / PARTIAL):
        raise UsageError(f"--output_dir {output.path}: must be on a disk that all nodes share")
    if distributed.any_rank(output.resume is not None and not (output.resume / STATE_FILE).is_file()):
        raise UsageError(
            f"some nodes do not see the checkpoint {output.resume}; move it to a disk that all nodes share"
        )
    return output


def _inspect_output(config: TrainConfig, restarted: bool) -> OutputFolder:
    inputs = [config.model.model_name_or_path, config.model.vision_path, config.model.llm_path]
    inputs += [config.data.meta_path, config.data.eval_meta_path]
    paths = [Path(path) for path in inputs if path and Path(path).exists()]
    paths += [Path(read_base(path).path) for path in paths if is_adapter(path)]
    folder = Path(config.run.output_dir)
    overwrite, resume = config.run.overwrite_output_dir, config.run.resume_from_checkpoint
    if restarted and list_checkpoints(folder):
        # After a restart by torchrun or SLURM, resume: these two flags apply only to the first start.
        overwrite, resume = False, "auto"
    return inspect_output_folder(folder, overwrite=overwrite, resume=resume, inputs=paths)


def _check_changes(config: TrainConfig, results: dict[str, Any]) -> list[str]:
    """Compare the run with the checkpoint that it resumes from; return the lines to log."""
    output = results.get("output")
    checkpoint = output.resume if output else None
    if checkpoint is None:
        return []
    return distributed.run_on_rank_0(
        lambda: _compare_with(checkpoint, config, results.get("specs"), results.get("eval_specs"))
    )


def _compare_with(
    checkpoint: Path,
    config: TrainConfig,
    specs: Sequence[DatasetSpec] | None,
    eval_specs: Sequence[DatasetSpec] | None,
) -> list[str]:
    """Compare the flags and datasets of this run with those of a checkpoint.

    Args:
        specs: training datasets; None if any of them is invalid. Then, only the flags are compared.
        eval_specs: validation datasets; None if any of them is invalid. Then, only the flags are compared.

    Returns:
        The lines to log (see `check_resume`).
    """
    if specs is None or eval_specs is None:
        current = fingerprint(config)
    else:
        data = DataState.of_files(specs, read_fingerprint(checkpoint).get(EXCLUDED, ()))
        eval_data = DataState.of_files(validation_specs(eval_specs)) if eval_specs else None
        current = fingerprint_run(config, data, eval_data)

    def rate() -> float:
        return scheduled_rate(config.run, current[TOTAL_STEPS], checkpoint_step(checkpoint) + 1)

    return check_resume(checkpoint, current, allow_changes=config.run.allow_resume_changes, rate=rate)


def _check_data(meta: str | None, config: TrainConfig, prefix: str = "") -> list[DatasetSpec]:
    """Return the datasets of a meta file, after opening their files and images; [] if `meta` is None.

    Raises:
        DataError: a file is invalid; the message starts with `prefix` and lists all problems.
    """
    if meta is None:
        return []
    problems = []
    try:
        specs = load_meta(meta, config.data.data_root or data_root(), config.data.image_root)
        for spec in specs:
            try:
                RecordFile(spec.annotation)
                open_root(spec.root)
            except DataError as error:
                problems.append(f"dataset {spec.name}: {error}")
        if problems:
            raise DataError(format_problems(problems))
    except DataError as error:
        raise DataError(f"{prefix}{error}") from None
    return specs


def _check_model(config: TrainConfig) -> Path:
    """Check the initial model; return its folder or, for an assembled model, the language model's folder."""
    model, data = config.model, config.data
    if model.model_name_or_path is None:
        vision, llm = map(model_folder, model.parts)
        weight_files(vision)
        weight_files(llm)
        return llm
    folder = model_folder(model.model_name_or_path)
    problems = []
    if is_adapter(folder):
        adapter = read_adapter_config(folder)
        ranks = ranks_of(adapter)
        base, description = find_base(folder, model.base_model_path)
        model_config = read_config(base)
        variant = (adapter.use_dora, adapter.use_rslora, description.quantization is not None)
    else:
        model_config = read_config(folder)
        model_weights(folder)
        ranks = (model_config.use_llm_lora, model_config.use_backbone_lora)
        variant = (False, False, False)
    problems += [
        f"{folder} contains adapters trained with --{flag} {value}; pass this flag to continue training "
        "them, or merge them first (m3llm merge)"
        for flag, value in zip(("use_dora", "use_rslora", "load_in_4bit"), variant, strict=True)
        if any(ranks) and value != getattr(model, flag)
    ]
    for tower, flag, rank, flag_rank in (
        ("language model", "use_llm_lora", ranks[0], model.use_llm_lora),
        ("vision tower", "use_backbone_lora", ranks[1], model.use_backbone_lora),
    ):
        if rank and rank != flag_rank:
            problems.append(
                f"{folder} contains adapters of rank {rank} in the {tower}, but --{flag} is {flag_rank}; "
                f"pass --{flag} {rank} to continue training them, or merge them first (m3llm merge)"
            )
    if data.down_sample_ratio != model_config.downsample_ratio:
        problems.append(
            f"--down_sample_ratio {data.down_sample_ratio}: must be {model_config.downsample_ratio}, as in "
            "the model"
        )
    layers = model_config.vision_config.num_hidden_layers
    if abs(model.unfreeze_vit_layers) > layers:
        problems.append(
            f"--unfreeze_vit_layers {model.unfreeze_vit_layers}: the vision tower has only {layers} layers"
        )
    changed = dataclasses.replace(model_config)
    apply_flags(changed, config)
    problems += [f"with these flags: {problem}" for problem in changed.problems()]
    model_config.build_llm_config()
    load_tokenizer(folder)
    _raise(problems)
    return folder


def apply_flags(model_config: InternVLChatConfig, config: TrainConfig) -> None:
    """Set fields of the model configuration from the flags, like the reference."""
    model, data = config.model, config.data
    model_config.template = data.conv_style
    model_config.select_layer = model.vision_select_layer
    model_config.ps_version = model.ps_version
    for name in ("dynamic_image_size", "use_thumbnail", "min_dynamic_patch", "max_dynamic_patch",
                 "pad2square", "force_image_size"):  # fmt: skip
        setattr(model_config, name, getattr(data, name))
