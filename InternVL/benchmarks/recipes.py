"""The two recipes that every preset trains by."""

from dataclasses import dataclass

from peft import LoraConfig

LEARNING_RATE = 5e-6
WEIGHT_DECAY = 0.05
MAX_GRAD_NORM = 1.0
LORA_DROPOUT = 0.05
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LOADER_WORKERS = 4
RECORDS_AN_EPOCH = 237_748


@dataclass(frozen=True)
class Recipe:
    """What is trained, and with how many records a step.

    Attributes:
        step_records: records of an optimizer step.
        lora_rank: of the adapters in the language model, the rest frozen; 0 trains the language model and
            the projector whole.
        warmup: untimed steps by default.
        steps: timed steps by default.
    """

    step_records: int
    lora_rank: int
    warmup: int
    steps: int


RECIPES = {
    "lora": Recipe(step_records=16, lora_rank=16, warmup=1, steps=2),
    "full": Recipe(step_records=2, lora_rank=0, warmup=3, steps=12),
}


def plain_lora(recipe: Recipe, target_modules: str | list[str]) -> LoraConfig:
    """Return peft's configuration of the recipe's adapters."""
    return LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=2 * recipe.lora_rank,
        lora_dropout=LORA_DROPOUT,
        target_modules=target_modules,
    )
