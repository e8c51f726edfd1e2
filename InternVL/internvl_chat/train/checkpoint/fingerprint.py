"""What must be the same for a run to go on from a checkpoint, stored in it and compared before loading."""

import json
from pathlib import Path
from typing import Any

from internvl_chat.data.dataset import TrainingData
from internvl_chat.train.arguments import Arguments
from internvl_chat.utils.errors import UsageError

FINGERPRINT = "run_fingerprint.json"

# What is settled only when model and data are there.
SET_SIZES = "records of each set"
WEIGHT_PRECISION = "weight precision"
LEFT_OUT = "records left out"

_MODEL_FLAGS = (
    "freeze_llm", "freeze_backbone", "freeze_mlp", "unfreeze_vit_layers", "unfreeze_lm_head", "use_llm_lora",
    "use_backbone_lora", "lora_dropout", "vision_select_layer", "ps_version",
)  # fmt: skip
_RUN_FLAGS = (
    "seed", "bf16", "loss_reduction", "train_sampling_strategy", "learning_rate", "weight_decay",
    "warmup_ratio", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon",
)  # fmt: skip
_DATA_FLAGS = (
    "conv_style", "max_seq_length", "force_image_size", "dynamic_image_size", "use_thumbnail",
    "min_dynamic_patch", "max_dynamic_patch", "normalize_type", "pad2square", "use_data_resampling",
    "truncate_text",
)  # fmt: skip


def fingerprint(args: Arguments) -> dict[str, Any]:
    """Return what the order of the records and the optimizer's state depend on."""
    found = {name: getattr(args.model, name) for name in _MODEL_FLAGS}
    found |= {name: getattr(args.run, name) for name in _RUN_FLAGS}
    found |= {name: getattr(args.data, name) for name in _DATA_FLAGS}
    found["lr_scheduler_type"] = str(args.run.lr_scheduler_type.value)
    found["optim"] = str(args.run.optim.value)
    found["records of a step"] = args.run.step_records
    found["DeepSpeed"] = bool(args.run.deepspeed)
    return found


def describe_data(data: TrainingData) -> dict[str, Any]:
    """Return what the order of the records depends on: how many of which files."""
    contents = {
        f"SHA-256 of the annotation file of {records.spec.name}": digest
        for records, digest in zip(data.sets, data.digests, strict=True)
    }
    return {SET_SIZES: data.sizes} | contents


def read_fingerprint(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint remembers of its run; nothing where it has no such file."""
    file = checkpoint / FINGERPRINT
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def check_same_run(checkpoint: Path, current: dict[str, Any]) -> None:
    """Compare a run with the one that wrote a checkpoint.

    Raises:
        UsageError: names every difference.
    """
    stored = read_fingerprint(checkpoint)
    problems = [
        f"cannot resume {checkpoint}: {name} was {stored[name]!r} there, and is {value!r} here; "
        "give the same, or start anew in another --output_dir"
        for name, value in current.items()
        if name in stored and stored[name] != value
    ]
    if problems:
        raise UsageError(problems)


def write_fingerprint(checkpoint: Path, current: dict[str, Any]) -> None:
    """Store a run's fingerprint in a checkpoint."""
    (checkpoint / FINGERPRINT).write_text(json.dumps(current, indent=2) + "\n", encoding="utf-8")
