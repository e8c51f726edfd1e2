"""Training flags: all flags of the reference, the supported flags of transformers, and our own.

Importing this module does not import torch, so that help and shell completion are fast.
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

PARALLEL_MODES = ("auto", "ddp", "fsdp", "hsdp", "deepspeed")
# Modes that shard the weights with FSDP2.
FSDP_MODES = ("fsdp", "hsdp")
INTERVALS = ("no", "steps", "epoch")

# Group titles, in display order.
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

# Accepted range of each numeric flag; infinite values are always rejected. `checks` tests limits that depend
# on the model, the data or other flags.
RANGES = {
    flag: interval
    for interval, flags in {
        "(-inf, inf)": "unfreeze_vit_layers vision_select_layer",
        "[-1, inf)": "max_steps local_rank",
        "[0, inf)": "use_backbone_lora use_llm_lora learning_rate vision_lr projector_lr llm_lr "
        "weight_decay adam_epsilon max_grad_norm "
        "warmup_steps max_bad_steps dataloader_num_workers eval_generate eval_samples eval_delay "
        "early_stopping_patience logging_steps save_steps eval_steps",
        "[0, 1)": "lora_dropout drop_path_rate adam_beta1 adam_beta2 warmup_ratio",
        "[0, 1]": "max_bad_fraction",
        "(0, 1]": "down_sample_ratio",
        "(0, inf)": "loraplus_lr_ratio",
        "[0, 1e9]": "num_train_epochs hang_seconds",
        "[0, 4294967295]": "seed",
        "[1, 1e9]": "ddp_timeout",
        "[1, inf)": "max_seq_length force_image_size min_dynamic_patch max_dynamic_patch "
        "per_device_train_batch_size gradient_accumulation_steps global_batch_size max_packed_tokens "
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
    """Flags for the model and its trainable parameters."""

    model_name_or_path: str | None = _model(None, "Initial model: model folder, adapter folder or hub id.")
    base_model_path: str | None = _lora(None, "Folder of the adapters' base model, if it was moved.")
    vision_path: str | None = _model(None, "InternViT folder for assembling a model (with --llm_path).")
    llm_path: str | None = _model(None, "Language-model folder for assembling a model (with --vision_path).")
    mlp_path: str | None = _model(
        None, "Weight file of the projector (mlp1) for assembling a model [random weights]."
    )
    freeze_llm: bool = _model(False, "Freeze the language model.")
    freeze_backbone: bool = _model(False, "Freeze the vision tower.")
    freeze_mlp: bool = _model(False, "Freeze the projector.")
    unfreeze_vit_layers: int = _model(
        0,
        "Train the vision blocks from this index on, even if the vision tower is frozen; negative values "
        "count from the end, 0 disables.",
    )
    unfreeze_lm_head: bool = _model(False, "Train the output head even if the language model is frozen.")
    vision_select_layer: int = _model(-1, "Index of the vision block whose output is used; -1 is the last.")
    use_backbone_lora: int = _lora(0, "LoRA rank in the vision tower; 0 disables. Alpha is twice the rank.")
    use_llm_lora: int = _lora(0, "LoRA rank in the language model; 0 disables. Alpha is twice the rank.")
    lora_dropout: float = _lora(0.05, "Dropout probability of the adapters' input.")
    use_dora: bool = _lora(False, "Also train the norm of each row of the adapted weights (DoRA).")
    use_rslora: bool = _lora(
        False,
        "Scale the adapters by alpha / sqrt(rank) instead of alpha / rank (rsLoRA).",
    )
    load_in_4bit: bool = _lora(
        False,
        "Train adapters on 4-bit weights of the language model (QLoRA); requires bitsandbytes.",
    )
    grad_checkpoint: str = _memory(
        "auto",
        "Activation checkpointing: True (all layers), False (none) or auto (as few layers as fit in memory).",
    )
    drop_path_rate: float = _model(0.0, "Stochastic-depth rate of the vision tower.")
    ps_version: str = _model("v2", "Version of the pixel shuffle.", ("v1", "v2"))
    use_fast_tokenizer: bool = _model(False, "No effect: both tokenizers produce the same token ids.")
    attn: str = _memory(
        "auto", "Attention kernel of the vision tower and the language model.", ATTENTION_NAMES
    )
    use_liger: bool = _memory(False, "Use Liger's kernels for RMSNorm, SwiGLU and RoPE (NVIDIA GPUs).")

    @property
    def parts(self) -> tuple[str, str]:
        """Paths to the vision tower and the language model of an assembled model."""
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
    """Flags for the data and its encoding."""

    meta_path: str | None = _data(None, "Meta file of the training datasets, such as PMC-data.json.")
    eval_meta_path: str | None = _validation(
        None, "Meta file of the validation datasets; see --eval_strategy."
    )
    data_root: str | None = _data(
        None, "Base folder for relative paths in the meta file [$DATA_ROOT, or the repository]."
    )
    conv_style: str = _data("internvl2_5", "Conversation template.", tuple(SYSTEM_TEXTS))
    max_seq_length: int = _data(8192, "Maximum number of tokens per record; longer records get fewer tiles.")
    force_image_size: int = _data(448, "Tile size in pixels.")
    down_sample_ratio: float = _data(0.5, "Downsampling ratio of the pixel shuffle; must match the model.")
    pad2square: bool = _data(False, "Pad single-tile images to a square instead of stretching them.")
    dynamic_image_size: bool = _data(False, "Split images into tiles according to their aspect ratio.")
    use_thumbnail: bool = _data(False, "Append a thumbnail of each image to its tiles.")
    min_dynamic_patch: int = _data(
        1, "Minimum number of tiles per image; if the image's limit is lower, it gets one tile."
    )
    max_dynamic_patch: int = _data(
        12, "Maximum number of tiles per record; a limit in the meta file takes precedence."
    )
    normalize_type: str = _data(
        "imagenet", "Mean and standard deviation for pixel normalization.", tuple(NORMALIZATIONS)
    )
    use_data_resampling: bool = _data(
        False, "Sample datasets in proportion to the square root of their size."
    )
    check: str = _data(
        "fast",
        "Data check before loading weights: fast reads the header and the end of each image, full decodes "
        "all images, off is fast without warnings.",
        ("full", "fast", "off"),
    )
    on_bad_record: str = _data(
        "fail",
        "Handling of unusable records: fail stops the run, skip excludes and logs them.",
        POLICIES,
    )
    max_bad_fraction: float = _data(0.01, "Maximum fraction of records to exclude with --on_bad_record skip.")
    truncate_text: bool = _data(False, "Truncate records that are too long even with one tile per image.")
    image_root: str | None = _data(
        None,
        "Folder, shards or URL of the images, if --meta_path is an annotation file instead of a meta file.",
    )
    image_background: str = _data(
        "none",
        "Background color for transparent pixels; none ignores transparency, like the reference.",
        BACKGROUNDS,
    )
    exif_transpose: bool = _data(False, "Rotate images according to their EXIF orientation.")
    escape_control_tokens: bool = _data(
        False, "Tokenize control tokens such as <|im_end|> in messages as plain text."
    )


@dataclass
class RunArguments:
    """Flags for the run: supported flags of transformers' `TrainingArguments`, and our own.

    Flags from transformers keep its types and defaults. `resolve_run` turns them into a `RunConfig`.
    """

    output_dir: str | None = _checkpoints(None, "Output folder for logs, checkpoints and the final model.")
    overwrite_output_dir: bool = _checkpoints(False, "Delete an earlier run in --output_dir.")
    # batch, steps and order
    per_device_train_batch_size: int = _optimization(
        8, "Records per rank and accumulation step; with --packing False, also per forward pass."
    )
    gradient_accumulation_steps: int = _optimization(1, "Number of accumulation steps per optimizer step.")
    global_batch_size: int | None = _optimization(
        None,
        "Records per optimizer step across all ranks, for any number of ranks; replaces "
        "--gradient_accumulation_steps.",
    )
    num_train_epochs: float = _optimization(3.0, "Number of epochs.")
    max_steps: int = _optimization(-1, "Number of optimizer steps; overrides --num_train_epochs if positive.")
    loss_reduction: str = _optimization(
        "sample",
        "Loss weight of each token in a record with n supervised tokens: sample 1/n (equal weight per "
        "record), token 1, square 1/sqrt(n).",
        LOSS_REDUCTIONS,
    )
    train_sampling_strategy: str = _data(
        "random", "Record order; group_by_length is the same as random.", SAMPLING_STRATEGIES
    )
    group_by_length: bool = _data(False, "No effect: steps are always balanced across ranks by cost.")
    seed: int = _optimization(42, "Seed of the initialization, the record order and dropout.")
    full_determinism: bool = _optimization(False, "Use only deterministic algorithms (slower).")
    # optimizer
    learning_rate: float = _optimization(5e-5, "Peak learning rate.")
    vision_lr: float | None = _optimization(None, "Peak learning rate of the vision tower [--learning_rate].")
    projector_lr: float | None = _optimization(None, "Peak learning rate of the projector [--learning_rate].")
    llm_lr: float | None = _optimization(None, "Peak learning rate of the language model [--learning_rate].")
    loraplus_lr_ratio: float = _lora(
        1.0, "Ratio of the learning rate of the adapters' B matrices to that of the A matrices (LoRA+)."
    )
    lr_scheduler_type: str = _optimization(
        "linear", "Learning-rate schedule from transformers, such as linear or cosine."
    )
    lr_scheduler_kwargs: str | None = _optimization(None, "Options of the learning-rate schedule, as JSON.")
    warmup_steps: float = _optimization(0.0, "Warm-up steps, or a fraction of all steps if below 1.")
    warmup_ratio: float = _optimization(
        0.0,
        "Warm-up steps as a fraction of all steps; if --warmup_steps is also given, the last of both counts.",
    )
    optim: str = _optimization(
        "adamw_torch_fused", "Optimizer from transformers, such as adamw_torch, adafactor or adamw_8bit."
    )
    optim_args: str | None = _optimization(None, "Options of the optimizer, as name=value,name=value.")
    weight_decay: float = _optimization(0.0, "Weight decay of all parameters except biases and norms.")
    adam_beta1: float = _optimization(0.9, "Decay rate of Adam's first moment.")
    adam_beta2: float = _optimization(0.999, "Decay rate of Adam's second moment.")
    adam_epsilon: float = _optimization(1e-8, "Adam's epsilon.")
    max_grad_norm: float = _optimization(1.0, "Maximum norm of the gradients; 0 disables clipping.")
    weight_precision: str = _optimization(
        "master",
        "Update of bf16 weights: master (float32 copies), stochastic (stochastic rounding) or bf16 (as in "
        "the reference); auto is the former name of master.",
        ("auto", *WEIGHT_PRECISIONS),
    )
    max_bad_steps: int = _optimization(
        5,
        "Maximum number of skipped steps (non-finite loss or gradients, or no supervised tokens) before the "
        "run fails.",
    )
    do_train: bool = _optimization(True, "Must be True: this script only trains.")
    # computation
    bf16: bool = _memory(False, "Train in bfloat16; otherwise in float32.")
    tf32: bool | None = _memory(None, "Use TF32 for float32 matrix products [torch's default].")
    packing: bool = _memory(
        True, "Pack multiple records into one sequence; without dropout, the losses change only by rounding."
    )
    max_packed_tokens: int = _memory(16384, "Maximum number of tokens of a packed sequence.")
    torch_compile: bool = _memory(
        False, "Compile the transformer blocks of the vision tower and the language model."
    )
    dataloader_num_workers: int = _memory(0, "Dataloader workers per rank; 0 loads in the main process.")
    dataloader_prefetch_factor: int | None = _memory(None, "Number of steps that each worker prefetches [2].")
    dataloader_pin_memory: bool = _memory(True, "Load batches into pinned memory (GPUs only).")
    use_cpu: bool = _distributed(False, "Train on the CPU.")
    parallel: str = _distributed(
        "auto",
        "Layout: ddp, fsdp (FSDP2), hsdp (FSDP2 within each node), deepspeed (with --deepspeed), or auto "
        "(the first of ddp, hsdp, fsdp that fits in memory).",
        PARALLEL_MODES,
    )
    deepspeed: str | None = _distributed(None, "DeepSpeed configuration: a JSON file or JSON text.")
    cpu_offload: bool = _distributed(
        False,
        "With FSDP2, keep weights, gradients and optimizer state in host memory, and update the weights on "
        "the CPU (slower).",
    )
    fsdp: str = _distributed(
        "",
        "full_shard is equivalent to --parallel fsdp, hybrid_shard to --parallel hsdp, and offload to "
        "--cpu_offload True.",
    )
    ddp_bucket_cap_mb: int | None = _distributed(None, "DDP's bucket size in MB [torch's default].")
    ddp_backend: str | None = _distributed(
        None, "Communication backend; only the defaults are supported: nccl (GPUs), gloo (CPUs)."
    )
    ddp_timeout: int = _distributed(1800, "Timeout of collectives within a training step, in seconds.")
    local_rank: int = _distributed(-1, "No effect: torchrun sets the rank in the environment.")
    # validation
    do_eval: bool = _validation(False, "No effect: validation depends on --eval_strategy.")
    eval_strategy: str = _validation("no", "When to validate.", INTERVALS)
    evaluation_strategy: str | None = _validation(None, "Former name of --eval_strategy.")
    eval_steps: float | None = _validation(
        None, "Steps between validations, or a fraction of all steps if below 1 [--save_steps]."
    )
    eval_delay: float = _validation(
        0, "Steps before the first validation (epochs with --eval_strategy epoch)."
    )
    eval_on_start: bool = _validation(False, "Also validate before the first step.")
    eval_generate: int = _validation(
        0, "Number of answers per dataset to generate and score in each validation."
    )
    eval_samples: int = _validation(
        6,
        "Number of answers, across all datasets, to generate in each validation and write to samples.jsonl "
        "for the run report.",
    )
    metric_for_best_model: str | None = _validation(
        None, "Metric that selects the best checkpoint [eval_loss]."
    )
    greater_is_better: bool | None = _validation(
        None, "Whether a higher metric is better [True unless its name ends in loss]."
    )
    load_best_model_at_end: bool = _validation(False, "Use the best checkpoint as the final model.")
    early_stopping_patience: int = _validation(
        0, "Consecutive validations without improvement before training stops; 0 disables."
    )
    # checkpoints
    save_strategy: str = _checkpoints("steps", "When to save a checkpoint.", (*INTERVALS, "best"))
    save_steps: float = _checkpoints(500, "Steps between checkpoints, or a fraction of all steps if below 1.")
    save_total_limit: int | None = _checkpoints(
        None, "Maximum number of checkpoints to keep, including the best [all]."
    )
    save_only_model: bool = _checkpoints(
        False, "Save checkpoints without optimizer state; the run cannot be resumed exactly."
    )
    async_save: bool = _checkpoints(True, "Write checkpoints in the background while training continues.")
    resume_from_checkpoint: str | None = _checkpoints(
        None, "Checkpoint to resume from [the newest one in --output_dir]."
    )
    allow_resume_changes: bool = _checkpoints(
        False, "On resume, allow changed settings that are compatible with the checkpoint."
    )
    # logging
    logging_strategy: str = _reporting("steps", "When to log.", INTERVALS)
    logging_steps: float = _reporting(500, "Steps between log lines, or a fraction of all steps if below 1.")
    logging_first_step: bool = _reporting(False, "Also log the first step.")
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={
            "group": "reporting",
            "help": "Trackers such as wandb or tensorboard, separated by spaces or commas; none disables.",
        },
    )
    run_name: str | None = _reporting(None, "Name of the run in the trackers.")
    disable_tqdm: bool | None = _reporting(None, "Hide the progress bar.")
    # checks
    sanity_check: bool = _reporting(
        False,
        "Before training, check the preprocessing, log supervised text, and compare the losses of packed and "
        "single records.",
    )
    self_test: bool = _reporting(False, "Former name of --sanity_check.")
    hang_seconds: float = _reporting(
        1800.0, "Seconds without a finished step before the stacks of all threads are printed; 0 disables."
    )
