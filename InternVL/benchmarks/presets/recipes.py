"""The two training recipes, and their flags for the training script."""

from dataclasses import dataclass

from peft import LoraConfig

LEARNING_RATE = 5e-6
WEIGHT_DECAY = 0.05
MAX_GRAD_NORM = 1.0
LORA_DROPOUT = 0.05
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DATALOADER_WORKERS = 4
RECORDS_PER_EPOCH = 237_748

Flags = dict[str, object]


@dataclass(frozen=True)
class Recipe:
    """Trainable parameters and batch size.

    Attributes:
        step_records: records per optimizer step.
        lora_rank: rank of the LoRA adapters in the language model, while everything else is frozen. 0 trains
            the language model and the projector instead.
        warmup: default number of untimed steps.
        steps: default number of timed steps.
    """

    step_records: int
    lora_rank: int
    warmup: int
    steps: int


RECIPES = {
    "lora": Recipe(step_records=16, lora_rank=16, warmup=1, steps=2),
    "full": Recipe(step_records=2, lora_rank=0, warmup=3, steps=12),
}

# Flags of the launchers, except those that depend on the job.
RECIPE_FLAGS: Flags = {
    "conv_style": "internvl2_5",
    "down_sample_ratio": 0.5,
    "drop_path_rate": 0.0,
    "freeze_backbone": True,
    "vision_select_layer": -1,
    "dataloader_num_workers": DATALOADER_WORKERS,
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
    # All presets use the records in file order.
    "train_sampling_strategy": "sequential",
}


def fast_flags(device: str, bf16: bool) -> Flags:
    """Return the flags of the `fast` preset that differ from the defaults of the training script."""
    # On a CPU, longer packs and float32 masters would only cost memory.
    flags: Flags = {"max_packed_tokens": 4096} if device == "cpu" else {}
    return flags | ({"weight_precision": "stochastic"} if device == "cpu" and bf16 else {})


def as_tokens(flags: Flags) -> list[str]:
    """Convert flags to command-line tokens."""
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def plain_lora(recipe: Recipe, target_modules: str | list[str]) -> LoraConfig:
    """Return the LoRA configuration of a recipe for peft."""
    return LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=2 * recipe.lora_rank,
        lora_dropout=LORA_DROPOUT,
        target_modules=target_modules,
    )
