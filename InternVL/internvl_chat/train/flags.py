"""The flags of training: the reference's, transformers' TrainingArguments, and this project's own."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from internvl_chat.data.batching.sampler import STRATEGIES
from internvl_chat.data.encode.conversation import SYSTEM_TEXTS
from internvl_chat.data.encode.tiling import NORMALIZATIONS
from internvl_chat.data.sources.skip_policy import POLICIES
from internvl_chat.model.attention import ATTENTION_NAMES
from internvl_chat.model.loss import LOSS_REDUCTIONS
from internvl_chat.train.optim.adamw import WEIGHT_PRECISIONS

PARALLEL_MODES = ("auto", "ddp", "fsdp", "deepspeed")


def _arg(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """Return a dataclass field with its help text."""
    metadata: dict[str, Any] = {"help": text}
    if choices:
        metadata["choices"] = list(choices)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelArguments:
    """Which model to train, and which of its parts."""

    model_name_or_path: str | None = _arg(None, "Model folder, adapter folder or hub id to start from.")
    base_model_path: str | None = _arg(None, "Folder of the adapters' base model, if it has moved.")
    vision_path: str | None = _arg(None, "InternViT folder, to assemble a model from its parts.")
    llm_path: str | None = _arg(None, "Language-model folder, to assemble a model from its parts.")
    mlp_path: str | None = _arg(
        None, "Weight file of the projector (mlp1), for a model assembled from its parts."
    )
    freeze_llm: bool = _arg(False, "Freeze the language model.")
    freeze_backbone: bool = _arg(False, "Freeze the vision tower.")
    freeze_mlp: bool = _arg(False, "Freeze the projector.")
    unfreeze_vit_layers: int = _arg(0, "Train the vision blocks from this one on (negative from the end).")
    unfreeze_lm_head: bool = _arg(False, "Train the head even if the language model is frozen.")
    vision_select_layer: int = _arg(-1, "Vision layer whose output is used; -1 is the last.")
    use_backbone_lora: int = _arg(0, "LoRA rank in the vision tower; 0 for none. Alpha is twice the rank.")
    use_llm_lora: int = _arg(0, "LoRA rank in the language model; 0 for none. Alpha is twice the rank.")
    lora_dropout: float = _arg(0.05, "Dropout before the adapters.")
    grad_checkpoint: str = _arg(
        "auto",
        "Activation checkpointing: True for every layer, False for none, auto for as many as memory needs.",
    )
    drop_path_rate: float = _arg(0.0, "Stochastic depth of the vision tower.")
    ps_version: str = _arg("v2", "Version of the pixel shuffle.", ("v1", "v2"))
    use_fast_tokenizer: bool = _arg(False, "Accepted for the reference; both tokenizers give the same ids.")
    attn: str = _arg("auto", "Attention kernel of both towers.", ATTENTION_NAMES)
    use_liger: bool = _arg(False, "Use Liger's kernels for RMSNorm, SwiGLU and RoPE (NVIDIA GPUs).")

    def __post_init__(self) -> None:
        object.__setattr__(self, "grad_checkpoint", _three_way("grad_checkpoint", self.grad_checkpoint))


@dataclass(frozen=True)
class DataArguments:
    """Which data to train on, and how text and images become tokens."""

    meta_path: str | None = _arg(None, "The meta file (PMC-data.json) with the data sets.")
    eval_meta_path: str | None = _arg(None, "A meta file of validation data; see --eval_strategy.")
    data_root: str | None = _arg(None, "Folder that relative paths in the meta file start from [repository].")
    conv_style: str = _arg("internvl2_5", "Conversation template.", tuple(SYSTEM_TEXTS))
    max_seq_length: int = _arg(
        8192, "Maximum tokens of a record; a longer one loses tiles, never image tokens."
    )
    force_image_size: int = _arg(448, "Tile size in pixels.")
    down_sample_ratio: float = _arg(0.5, "Down-sampling of the pixel shuffle; must be the model's.")
    pad2square: bool = _arg(False, "Pad a single-tile image to a square instead of resizing it to one.")
    dynamic_image_size: bool = _arg(False, "Split images into tiles by their aspect ratio.")
    use_thumbnail: bool = _arg(False, "Append a thumbnail of the image to its tiles.")
    min_dynamic_patch: int = _arg(1, "Minimum tiles of an image.")
    max_dynamic_patch: int = _arg(12, "Maximum tiles of a record; a data set's own limit wins.")
    normalize_type: str = _arg("imagenet", "Pixel statistics.", tuple(NORMALIZATIONS))
    use_data_resampling: bool = _arg(
        False, "Sample data sets in proportion to the square root of their size."
    )
    check: str = _arg(
        "fast",
        "Data check before weights are loaded: full decodes every image, fast reads its header and end, off "
        "skips the search for duplicates.",
        ("full", "fast", "off"),
    )
    on_bad_record: str = _arg(
        "fail", "What to do with an unusable record; skip excludes it by name.", POLICIES
    )
    max_bad_fraction: float = _arg(0.01, "Largest share of records that --on_bad_record skip may exclude.")
    truncate_text: bool = _arg(
        False, "Cut the end of a text that is too long even with one tile an image, instead of refusing it."
    )

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"--max_bad_fraction {self.max_bad_fraction} must be from 0 to 1")


@dataclass
class RunArguments(TrainingArguments):
    """transformers' training flags, those of the reference that transformers 5 has dropped, and our own.

    Only the flags are inherited: `resolve_run` gives them their meaning, once.
    """

    evaluation_strategy: str | None = _arg(None, "Former name of --eval_strategy.")
    overwrite_output_dir: bool = _arg(False, "Delete an earlier run in output_dir.")
    warmup_steps: float = _arg(
        0.0, "Steps over which the learning rate warms up, below 1 a share of all; 0: as --warmup_ratio says."
    )
    warmup_ratio: float = _arg(0.0, "Share of the steps over which it warms up; --warmup_steps wins.")
    do_train: bool = _arg(True, "Accepted for the reference; the script only trains.")
    group_by_length: bool = _arg(False, "Accepted for the reference; steps are always balanced by cost.")
    loss_reduction: str = _arg("sample", "What weighs the same in a step.", LOSS_REDUCTIONS)
    train_sampling_strategy: str = _arg("random", "Order of the records.", STRATEGIES)
    parallel: str = _arg(
        "auto",
        "Parallelism over several GPUs: ddp, fsdp (FSDP2), deepspeed (with --deepspeed), or auto: ddp if the "
        "memory plan fits, else fsdp.",
        PARALLEL_MODES,
    )
    fsdp: str = _arg("", "full_shard is another name of --parallel fsdp; nothing else is supported.")
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "Trackers, separated by spaces or commas, such as wandb tensorboard; or none."},
    )
    packing: bool = _arg(True, "Pack a rank's records of a step into one row; changes no result.")
    max_packed_tokens: int = _arg(16384, "Maximum tokens of a packed forward pass.")
    weight_precision: str = _arg(
        "master",
        "How bf16 weights are updated: with float32 masters, with stochastic rounding, or in bf16 as the "
        "reference does (auto is the former name of master).",
        ("auto", *WEIGHT_PRECISIONS),
    )
    async_save: bool = _arg(True, "Write checkpoints while training goes on; False waits for each.")
    sanity_check: bool = _arg(
        False, "Before training, show the supervised text and compare packed with single records (seconds)."
    )
    self_test: bool = _arg(False, "Former name of --sanity_check.")
    max_bad_steps: int = _arg(
        5, "Steps with a non-finite loss or gradient that are skipped before the run ends."
    )
    hang_seconds: float = _arg(1800.0, "Print all stacks after this many seconds without a step; 0 never.")
    eval_steps: float | None = _arg(
        None, "Steps from one validation to the next, below 1 a share of all [--save_steps]."
    )
    eval_generate: int = _arg(
        0, "Questions of each validation set to answer in each validation (exact match, ROUGE-L)."
    )
    early_stopping_patience: int = _arg(
        0, "Stop after this many validations in a row without a new best; 0 never."
    )

    def __post_init__(self) -> None:
        """Leave the flags as given: transformers would set up devices and environment variables here."""


def _three_way(flag: str, value: str) -> str:
    """Return `auto`, `True` or `False`, however it is spelled."""
    known = (
        {"auto": "auto"}
        | dict.fromkeys(("true", "1", "yes"), "True")
        | dict.fromkeys(("false", "0", "no"), "False")
    )
    if str(value).lower() not in known:
        raise ValueError(f"--{flag} {value}: must be auto, True or False")
    return known[str(value).lower()]
