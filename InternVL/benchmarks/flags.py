"""The flags of the training command: the recipe's, and the levers that the preset `fast` pulls."""

from benchmarks.recipes import LEARNING_RATE, LOADER_WORKERS, WEIGHT_DECAY

Flags = dict[str, object]

# The launchers' flags, but for what depends on the job.
RECIPE_FLAGS: Flags = {
    "conv_style": "internvl2_5",
    "down_sample_ratio": 0.5,
    "drop_path_rate": 0.0,
    "freeze_backbone": True,
    "vision_select_layer": -1,
    "dataloader_num_workers": LOADER_WORKERS,
    "num_train_epochs": 1,
    "save_strategy": "no",
    "learning_rate": LEARNING_RATE,
    "weight_decay": WEIGHT_DECAY,
    "warmup_ratio": 0.03,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "max_seq_length": 8192,
    "group_by_length": True,
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "ps_version": "v2",
    "loss_reduction": "sample",
    "per_device_train_batch_size": 1,
    "report_to": "none",
    "disable_tqdm": True,
    # The records lie in the order in which they are to be used.
    "train_sampling_strategy": "sequential",
}


def fast_flags(device: str, bf16: bool) -> Flags:
    """Return what makes `fast` fast, beside the defaults of training."""
    # A CPU gains nothing by longer packs, which cost memory, as do float32 masters of bf16 weights.
    flags: Flags = {"max_packed_tokens": 4096} if device == "cpu" else {}
    return flags | ({"weight_precision": "stochastic"} if device == "cpu" and bf16 else {})


def as_tokens(flags: Flags) -> list[str]:
    """Return flags as command-line tokens."""
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]
