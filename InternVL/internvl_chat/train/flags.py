"""Training flags: those of the reference, transformers' TrainingArguments, and our own."""

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
    """The model, and which of its parameters to train."""

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
    unfreeze_vit_layers: int = _arg(
        0, "Train the vision blocks from this index on, even if the tower is frozen; negative from the end."
    )
    unfreeze_lm_head: bool = _arg(False, "Train the head even if the language model is frozen.")
    vision_select_layer: int = _arg(-1, "Vision block whose output is used; -1 is the last.")
    use_backbone_lora: int = _arg(0, "LoRA rank in the vision tower; 0 for none. Alpha is twice the rank.")
    use_llm_lora: int = _arg(0, "LoRA rank in the language model; 0 for none. Alpha is twice the rank.")
    lora_dropout: float = _arg(0.05, "Dropout before the adapters.")
    grad_checkpoint: str = _arg(
        "auto",
        "Activation checkpointing: True for all layers, False for none, auto for only as many as required.",
    )
    drop_path_rate: float = _arg(0.0, "Stochastic depth of the vision tower.")
    ps_version: str = _arg("v2", "Version of the pixel shuffle.", ("v1", "v2"))
    use_fast_tokenizer: bool = _arg(False, "No effect: both tokenizers give the same ids.")
    attn: str = _arg("auto", "Attention kernel of both towers.", ATTENTION_NAMES)
    use_liger: bool = _arg(False, "Use Liger's kernels for RMSNorm, SwiGLU and RoPE (NVIDIA GPUs).")

    def __post_init__(self) -> None:
        names = {"true": "True", "1": "True", "yes": "True", "false": "False", "0": "False", "no": "False"}
        value = (names | {"auto": "auto"}).get(str(self.grad_checkpoint).lower())
        if value is None:
            raise ValueError(f"--grad_checkpoint {self.grad_checkpoint}: must be auto, True or False")
        object.__setattr__(self, "grad_checkpoint", value)


@dataclass(frozen=True)
class DataArguments:
    """The data, and how text and images are encoded."""

    meta_path: str | None = _arg(None, "Meta file of the training datasets (PMC-data.json).")
    eval_meta_path: str | None = _arg(None, "Meta file of the validation datasets; see --eval_strategy.")
    data_root: str | None = _arg(None, "Base folder of relative paths in the meta file [repository].")
    conv_style: str = _arg("internvl2_5", "Conversation template.", tuple(SYSTEM_TEXTS))
    max_seq_length: int = _arg(8192, "Maximum tokens of a record; longer records get fewer tiles.")
    force_image_size: int = _arg(448, "Tile size in pixels.")
    down_sample_ratio: float = _arg(0.5, "Down-sampling of the pixel shuffle; must match the model.")
    pad2square: bool = _arg(False, "Pad a single-tile image to a square instead of resizing it to one.")
    dynamic_image_size: bool = _arg(False, "Split images into tiles by their aspect ratio.")
    use_thumbnail: bool = _arg(False, "Append a thumbnail of the image to its tiles.")
    min_dynamic_patch: int = _arg(1, "Minimum tiles of an image.")
    max_dynamic_patch: int = _arg(12, "Maximum tiles of a record; a limit in the meta file takes precedence.")
    normalize_type: str = _arg("imagenet", "Pixel statistics.", tuple(NORMALIZATIONS))
    use_data_resampling: bool = _arg(False, "Sample datasets in proportion to the square root of their size.")
    check: str = _arg(
        "fast",
        "Data check before weights are loaded: full decodes every image, fast reads header and end of every "
        "image file, off omits the search for duplicates.",
        ("full", "fast", "off"),
    )
    on_bad_record: str = _arg(
        "fail", "Unusable records: fail stops the run, skip excludes and reports them.", POLICIES
    )
    max_bad_fraction: float = _arg(0.01, "Maximum fraction of records that --on_bad_record skip excludes.")
    truncate_text: bool = _arg(
        False, "Truncate records that are too long even with one tile per image, instead of refusing them."
    )

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"--max_bad_fraction {self.max_bad_fraction} must be between 0 and 1")


@dataclass
class RunArguments(TrainingArguments):
    """transformers' training flags, flags of the reference that transformers 5 has dropped, and our own.

    Only the flags are inherited; `resolve_run` interprets them.
    """

    evaluation_strategy: str | None = _arg(None, "Former name of --eval_strategy.")
    overwrite_output_dir: bool = _arg(False, "Delete an earlier run in output_dir.")
    warmup_steps: float = _arg(
        0.0, "Warm-up steps of the learning rate, or below 1 a fraction of all steps; 0: use --warmup_ratio."
    )
    warmup_ratio: float = _arg(0.0, "Fraction of warm-up steps; --warmup_steps takes precedence.")
    do_train: bool = _arg(True, "Must be True: this script only trains.")
    group_by_length: bool = _arg(False, "No effect: steps are always balanced across ranks by cost.")
    loss_reduction: str = _arg(
        "sample", "Weighting of the loss: per sample, per token, or square in between.", LOSS_REDUCTIONS
    )
    train_sampling_strategy: str = _arg("random", "Order of the records.", STRATEGIES)
    parallel: str = _arg(
        "auto",
        "Parallelism over several GPUs: ddp, fsdp (FSDP2), deepspeed (with --deepspeed), or auto (ddp if it "
        "fits into memory, otherwise fsdp).",
        PARALLEL_MODES,
    )
    fsdp: str = _arg("", "full_shard means --parallel fsdp; other values are not supported.")
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "Trackers, separated by spaces or commas, such as wandb tensorboard; or none."},
    )
    packing: bool = _arg(True, "Pack the records of a rank into one row; does not change the results.")
    max_packed_tokens: int = _arg(16384, "Maximum tokens of a packed forward pass.")
    weight_precision: str = _arg(
        "master",
        "Update of bf16 weights: with float32 master weights, with stochastic rounding, or in bf16 as in the "
        "reference (auto is the former name of master).",
        ("auto", *WEIGHT_PRECISIONS),
    )
    async_save: bool = _arg(True, "Write checkpoints in the background while training continues.")
    sanity_check: bool = _arg(
        False, "Before training, show supervised text and compare the losses of packed and single records."
    )
    self_test: bool = _arg(False, "Former name of --sanity_check.")
    max_bad_steps: int = _arg(
        5, "Maximum number of skipped steps (non-finite loss or gradient) before the run fails."
    )
    hang_seconds: float = _arg(1800.0, "Print all stacks after this many seconds without a step; 0 disables.")
    eval_steps: float | None = _arg(
        None, "Steps between validations, or below 1 a fraction of all steps [--save_steps]."
    )
    eval_generate: int = _arg(
        0, "Answers to generate per validation dataset in each validation (exact match, ROUGE-L)."
    )
    early_stopping_patience: int = _arg(
        0, "Stop after this many validations in a row without improvement; 0 disables."
    )

    def __post_init__(self) -> None:
        """Skip the method of transformers, which initialises devices and sets environment variables."""
