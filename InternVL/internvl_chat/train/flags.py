"""Training flags: those of the reference, the flags of transformers that are used, and our own.

Importing this module does not import torch, so that help and shell completion are quick.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from internvl_chat.constants import (
    ATTENTION_NAMES,
    BACKGROUNDS,
    LOSS_REDUCTIONS,
    NORMALIZATIONS,
    SAMPLING_STRATEGIES,
    SYSTEM_TEXTS,
    WEIGHT_PRECISIONS,
)
from internvl_chat.data.sources.skip_policy import POLICIES

PARALLEL_MODES = ("auto", "ddp", "fsdp", "deepspeed")
INTERVALS = ("no", "steps", "epoch")

# Titles of the groups, in the order of the help.
GROUPS = {
    "model": "Model",
    "lora": "LoRA",
    "data": "Data",
    "optimization": "Optimization",
    "memory": "Memory and speed",
    "distributed": "Devices and parallelism",
    "validation": "Validation",
    "checkpoints": "Output and checkpoints",
    "reporting": "Logging and checks",
}

# Accepted values of all numeric flags; infinite ones never are. What depends on the model, the data or other
# flags is checked later.
RANGES = {
    flag: interval
    for interval, flags in {
        "(-inf, inf)": "unfreeze_vit_layers vision_select_layer",
        "[-1, inf)": "max_steps local_rank",
        "[0, inf)": "use_backbone_lora use_llm_lora learning_rate weight_decay adam_epsilon max_grad_norm "
        "warmup_steps max_bad_steps dataloader_num_workers eval_generate eval_delay early_stopping_patience "
        "logging_steps save_steps eval_steps",
        "[0, 1)": "lora_dropout drop_path_rate adam_beta1 adam_beta2 warmup_ratio",
        "[0, 1]": "max_bad_fraction",
        "(0, 1]": "down_sample_ratio",
        "[0, 1e9]": "num_train_epochs hang_seconds",
        "[0, 4294967295]": "seed",
        "[1, 1e9]": "ddp_timeout",
        "[1, inf)": "max_seq_length force_image_size min_dynamic_patch max_dynamic_patch "
        "per_device_train_batch_size gradient_accumulation_steps max_packed_tokens "
        "dataloader_prefetch_factor ddp_bucket_cap_mb save_total_limit",
    }.items()
    for flag in flags.split()
}


def _arg(group: str, default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """Return a dataclass field with its group and help text."""
    metadata: dict[str, Any] = {"group": group, "help": text}
    if choices:
        metadata["choices"] = list(choices)
    return field(default=default, metadata=metadata)


_model = partial(_arg, "model")
_lora = partial(_arg, "lora")
_data = partial(_arg, "data")
_optimization = partial(_arg, "optimization")
_memory = partial(_arg, "memory")
_distributed = partial(_arg, "distributed")
_validation = partial(_arg, "validation")
_checkpoints = partial(_arg, "checkpoints")
_reporting = partial(_arg, "reporting")


@dataclass(frozen=True)
class ModelArguments:
    """The model, and which of its parameters to train."""

    model_name_or_path: str | None = _model(None, "Model folder, adapter folder or hub id to start from.")
    base_model_path: str | None = _lora(None, "Folder of the adapters' base model, if it has moved.")
    vision_path: str | None = _model(None, "InternViT folder, to assemble a model from its parts.")
    llm_path: str | None = _model(None, "Language-model folder, to assemble a model from its parts.")
    mlp_path: str | None = _model(
        None, "Weight file of the projector (mlp1), for a model assembled from its parts."
    )
    freeze_llm: bool = _model(False, "Freeze the language model.")
    freeze_backbone: bool = _model(False, "Freeze the vision tower.")
    freeze_mlp: bool = _model(False, "Freeze the projector.")
    unfreeze_vit_layers: int = _model(
        0, "Train the vision blocks from this index on, even if the tower is frozen; negative from the end."
    )
    unfreeze_lm_head: bool = _model(False, "Train the head even if the language model is frozen.")
    vision_select_layer: int = _model(-1, "Vision block whose output is used; -1 is the last.")
    use_backbone_lora: int = _lora(0, "LoRA rank in the vision tower; 0 for none. Alpha is twice the rank.")
    use_llm_lora: int = _lora(0, "LoRA rank in the language model; 0 for none. Alpha is twice the rank.")
    lora_dropout: float = _lora(0.05, "Dropout before the adapters.")
    grad_checkpoint: str = _memory(
        "auto",
        "Activation checkpointing: True for all layers, False for none, auto for only as many as required.",
    )
    drop_path_rate: float = _model(0.0, "Stochastic depth of the vision tower.")
    ps_version: str = _model("v2", "Version of the pixel shuffle.", ("v1", "v2"))
    use_fast_tokenizer: bool = _model(False, "No effect: both tokenizers give the same ids.")
    attn: str = _memory("auto", "Attention kernel of both towers.", ATTENTION_NAMES)
    use_liger: bool = _memory(False, "Use Liger's kernels for RMSNorm, SwiGLU and RoPE (NVIDIA GPUs).")

    @property
    def parts(self) -> tuple[str, str]:
        """Vision tower and language model of a model that is assembled from its parts."""
        if self.vision_path is None or self.llm_path is None:
            raise ValueError("the model is not assembled from its parts")
        return self.vision_path, self.llm_path

    def __post_init__(self) -> None:
        names = {"true": "True", "1": "True", "yes": "True", "false": "False", "0": "False", "no": "False"}
        value = (names | {"auto": "auto"}).get(str(self.grad_checkpoint).lower())
        if value is None:
            raise ValueError(f"--grad_checkpoint {self.grad_checkpoint}: must be auto, True or False")
        object.__setattr__(self, "grad_checkpoint", value)


@dataclass(frozen=True)
class DataArguments:
    """The data, and how text and images are encoded."""

    meta_path: str | None = _data(None, "Meta file of the training datasets (PMC-data.json).")
    eval_meta_path: str | None = _validation(
        None, "Meta file of the validation datasets; see --eval_strategy."
    )
    data_root: str | None = _data(None, "Base folder of relative paths in the meta file [repository].")
    conv_style: str = _data("internvl2_5", "Conversation template.", tuple(SYSTEM_TEXTS))
    max_seq_length: int = _data(8192, "Maximum tokens of a record; longer records get fewer tiles.")
    force_image_size: int = _data(448, "Tile size in pixels.")
    down_sample_ratio: float = _data(0.5, "Down-sampling of the pixel shuffle; must match the model.")
    pad2square: bool = _data(False, "Pad a single-tile image to a square instead of resizing it to one.")
    dynamic_image_size: bool = _data(False, "Split images into tiles by their aspect ratio.")
    use_thumbnail: bool = _data(False, "Append a thumbnail of the image to its tiles.")
    min_dynamic_patch: int = _data(1, "Minimum tiles of an image.")
    max_dynamic_patch: int = _data(
        12, "Maximum tiles of a record; a limit in the meta file takes precedence."
    )
    normalize_type: str = _data("imagenet", "Pixel statistics.", tuple(NORMALIZATIONS))
    use_data_resampling: bool = _data(
        False, "Sample datasets in proportion to the square root of their size."
    )
    check: str = _data(
        "fast",
        "Data check before weights are loaded: full decodes every image, fast reads header and end of every "
        "image file, off omits the search for duplicates.",
        ("full", "fast", "off"),
    )
    on_bad_record: str = _data(
        "fail", "Unusable records: fail stops the run, skip excludes and reports them.", POLICIES
    )
    max_bad_fraction: float = _data(0.01, "Maximum fraction of records that --on_bad_record skip excludes.")
    truncate_text: bool = _data(
        False, "Truncate records that are too long even with one tile per image, instead of refusing them."
    )
    image_root: str | None = _data(
        None, "Folder of the images, if --meta_path is an annotation file instead of a meta file."
    )
    image_background: str = _data(
        "none",
        "Color behind transparent pixels; none ignores transparency, as the reference does.",
        BACKGROUNDS,
    )
    exif_transpose: bool = _data(False, "Apply the rotation stored in images as EXIF orientation.")
    escape_control_tokens: bool = _data(
        False, "Read control tokens such as <|im_end|> in texts as plain text."
    )


@dataclass
class RunArguments:
    """The run: the flags of transformers' TrainingArguments that are used here, and our own.

    Flags of transformers have its types and defaults. `resolve_run` interprets them.
    """

    output_dir: str | None = _checkpoints(None, "Folder of the run: log, checkpoints and the final model.")
    overwrite_output_dir: bool = _checkpoints(False, "Delete an earlier run in output_dir.")
    # batch, steps and order
    per_device_train_batch_size: int = _optimization(
        8, "Records per rank in each accumulation step; with --packing False also per forward pass."
    )
    gradient_accumulation_steps: int = _optimization(1, "Accumulation steps per optimizer step.")
    num_train_epochs: float = _optimization(3.0, "Number of epochs.")
    max_steps: int = _optimization(-1, "Number of optimizer steps; overrides --num_train_epochs if positive.")
    loss_reduction: str = _optimization(
        "sample",
        "Loss weight of a token in a record with n supervised tokens: 1/n (sample: equal weight per record), "
        "1 (token), or 1/sqrt(n) (square).",
        LOSS_REDUCTIONS,
    )
    train_sampling_strategy: str = _data("random", "Order of the records.", SAMPLING_STRATEGIES)
    group_by_length: bool = _data(False, "No effect: steps are always balanced across ranks by cost.")
    seed: int = _optimization(42, "Seed of the initialization, the order of the records and dropout.")
    full_determinism: bool = _optimization(False, "Use deterministic algorithms only; slower.")
    # optimizer
    learning_rate: float = _optimization(5e-5, "Peak learning rate.")
    lr_scheduler_type: str = _optimization("linear", "Schedule of transformers, such as linear or cosine.")
    lr_scheduler_kwargs: str | None = _optimization(None, "Options of the schedule, as JSON.")
    warmup_steps: float = _optimization(0.0, "Warm-up steps, or a fraction of all steps if below 1.")
    warmup_ratio: float = _optimization(
        0.0, "Fraction of warm-up steps; of this flag and --warmup_steps, the later one counts."
    )
    optim: str = _optimization(
        "adamw_torch_fused", "Optimizer of transformers, such as adamw_torch, adafactor or adamw_8bit."
    )
    optim_args: str | None = _optimization(None, "Options of the optimizer, as name=value,name=value.")
    weight_decay: float = _optimization(0.0, "Weight decay of all parameters except biases and norms.")
    adam_beta1: float = _optimization(0.9, "Decay rate of Adam's first moment.")
    adam_beta2: float = _optimization(0.999, "Decay rate of Adam's second moment.")
    adam_epsilon: float = _optimization(1e-8, "Adam's epsilon.")
    max_grad_norm: float = _optimization(1.0, "Maximum norm of the gradients; 0 disables clipping.")
    weight_precision: str = _optimization(
        "master",
        "Update of bf16 weights: with float32 master weights, with stochastic rounding, or in bf16 as in the "
        "reference (auto is the former name of master).",
        ("auto", *WEIGHT_PRECISIONS),
    )
    max_bad_steps: int = _optimization(
        5, "Maximum number of skipped steps (non-finite loss or gradient) before the run fails."
    )
    do_train: bool = _optimization(True, "Must be True: this script only trains.")
    # computation
    bf16: bool = _memory(False, "Train in bfloat16; otherwise in float32.")
    tf32: bool | None = _memory(None, "Use TF32 for float32 matrix products [torch's default].")
    packing: bool = _memory(True, "Pack the records of a rank into one row; does not change the results.")
    max_packed_tokens: int = _memory(16384, "Maximum tokens of a packed forward pass.")
    torch_compile: bool = _memory(False, "Compile the blocks of both towers.")
    dataloader_num_workers: int = _memory(0, "Processes per rank that load data; 0: the main process.")
    dataloader_prefetch_factor: int | None = _memory(None, "Steps that each worker loads ahead [2].")
    dataloader_pin_memory: bool = _memory(True, "Load into pinned memory (GPUs).")
    use_cpu: bool = _distributed(False, "Train on the CPU.")
    parallel: str = _distributed(
        "auto",
        "Parallelism over several GPUs: ddp, fsdp (FSDP2), deepspeed (with --deepspeed), or auto (ddp if it "
        "fits into memory, otherwise fsdp).",
        PARALLEL_MODES,
    )
    deepspeed: str | None = _distributed(None, "DeepSpeed configuration: a JSON file or JSON text.")
    fsdp: str = _distributed("", "full_shard means --parallel fsdp; other values are not supported.")
    ddp_bucket_cap_mb: int | None = _distributed(None, "DDP's bucket size in MB [torch's default].")
    ddp_backend: str | None = _distributed(None, "Must be nccl on GPUs and gloo on CPUs, the defaults.")
    ddp_timeout: int = _distributed(1800, "Seconds until a collective operation times out.")
    local_rank: int = _distributed(-1, "No effect: torchrun sets the rank in the environment.")
    # validation
    do_eval: bool = _validation(False, "No effect: --eval_strategy decides whether to validate.")
    eval_strategy: str = _validation("no", "When to validate.", INTERVALS)
    evaluation_strategy: str | None = _validation(None, "Former name of --eval_strategy.")
    eval_steps: float | None = _validation(
        None, "Steps between validations, or a fraction of all steps if below 1 [--save_steps]."
    )
    eval_delay: float = _validation(0, "Steps or epochs before the first validation.")
    eval_on_start: bool = _validation(False, "Also validate before the first step.")
    eval_generate: int = _validation(
        0, "Answers to generate per validation dataset in each validation (exact match, ROUGE-L)."
    )
    metric_for_best_model: str | None = _validation(None, "Metric of the best checkpoint [eval_loss].")
    greater_is_better: bool | None = _validation(
        None, "Whether a higher metric is better [True unless its name ends in loss]."
    )
    load_best_model_at_end: bool = _validation(False, "Make the best checkpoint the final model.")
    early_stopping_patience: int = _validation(
        0, "Stop after this many validations in a row without improvement; 0 disables."
    )
    # checkpoints
    save_strategy: str = _checkpoints("steps", "When to save a checkpoint.", (*INTERVALS, "best"))
    save_steps: float = _checkpoints(500, "Steps between checkpoints, or a fraction of all steps if below 1.")
    save_total_limit: int | None = _checkpoints(None, "Checkpoints to keep, the best included [all].")
    save_only_model: bool = _checkpoints(False, "Save no optimizer state; the run cannot be resumed exactly.")
    async_save: bool = _checkpoints(True, "Write checkpoints in the background while training continues.")
    resume_from_checkpoint: str | None = _checkpoints(
        None, "Checkpoint to resume from [the newest one in output_dir]."
    )
    allow_resume_changes: bool = _checkpoints(
        False, "Resume with other settings that fit to the checkpoint, and log the effect of each."
    )
    # logging
    logging_strategy: str = _reporting("steps", "When to log.", INTERVALS)
    logging_steps: float = _reporting(500, "Steps between log lines, or a fraction of all steps if below 1.")
    logging_first_step: bool = _reporting(False, "Also log the first step.")
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={
            "group": "reporting",
            "help": "Trackers, separated by spaces or commas, such as wandb tensorboard; or none.",
        },
    )
    run_name: str | None = _reporting(None, "Name of the run in the trackers.")
    disable_tqdm: bool | None = _reporting(None, "Hide the progress bar.")
    # checks
    sanity_check: bool = _reporting(
        False, "Before training, show supervised text and compare the losses of packed and single records."
    )
    self_test: bool = _reporting(False, "Former name of --sanity_check.")
    hang_seconds: float = _reporting(
        1800.0, "Print all stacks after this many seconds without a step; 0 disables."
    )
