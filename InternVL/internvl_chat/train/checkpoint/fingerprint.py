"""Fingerprint of a run: settings that must not change when it is resumed; stored in every checkpoint."""

import json
from pathlib import Path
from typing import Any

from internvl_chat.data.dataset import TrainingData
from internvl_chat.train.config import TrainConfig
from internvl_chat.utils.errors import UsageError

FINGERPRINT = "run_fingerprint.json"

SET_SIZES = "records of each set"
EXCLUDED = "excluded records"
STEP_SIZE = "records of a step"

# Names in messages of the settings whose names in checkpoints are less clear.
_TITLES = {SET_SIZES: "records per dataset", STEP_SIZE: "global batch size (records per step)"}

_MODEL_FLAGS = (
    "freeze_llm", "freeze_backbone", "freeze_mlp", "unfreeze_vit_layers", "unfreeze_lm_head", "use_llm_lora",
    "use_backbone_lora", "lora_dropout", "vision_select_layer", "ps_version",
)  # fmt: skip
_RUN_FLAGS = (
    "seed", "bf16", "loss_reduction", "train_sampling_strategy", "learning_rate", "weight_decay",
    "warmup_steps", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args",
    "lr_scheduler_type", "lr_scheduler_kwargs",
)  # fmt: skip
_DATA_FLAGS = (
    "conv_style", "max_seq_length", "force_image_size", "dynamic_image_size", "use_thumbnail",
    "min_dynamic_patch", "max_dynamic_patch", "normalize_type", "pad2square", "use_data_resampling",
    "truncate_text", "image_background", "exif_transpose", "escape_control_tokens",
)  # fmt: skip


def fingerprint(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that determine the order of the records and the optimizer state.

    The number of ranks and the parallel layout may change, except with DeepSpeed.
    """
    groups = (config.model, _MODEL_FLAGS), (config.run, _RUN_FLAGS), (config.data, _DATA_FLAGS)
    settings = {name: getattr(group, name) for group, names in groups for name in names}
    settings["weight precision"] = config.run.weight_precision
    settings[STEP_SIZE] = config.run.records_per_step
    settings["DeepSpeed"] = bool(config.run.deepspeed)
    if config.run.deepspeed:
        settings["number of ranks (with DeepSpeed use as many as before)"] = config.run.world_size
    return settings


def describe_data(data: TrainingData) -> dict[str, Any]:
    """Return the annotation files, their sizes and the excluded records, which determine the order."""
    contents = {
        f"SHA-256 of the annotation file of {records.spec.name}": digest
        for records, digest in zip(data.sets, data.digests, strict=True)
    }
    excluded = [[record.dataset, int(record.index)] for record in data.excluded]
    return {SET_SIZES: data.sizes, EXCLUDED: excluded} | contents


def read_fingerprint(checkpoint: Path) -> dict[str, Any]:
    """Return the fingerprint stored in a checkpoint; empty if there is none."""
    file = checkpoint / FINGERPRINT
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def check_same_run(checkpoint: Path, current: dict[str, Any]) -> None:
    """Compare a fingerprint with the one stored in a checkpoint.

    Raises:
        UsageError: lists all differences.
    """
    stored, current = read_fingerprint(checkpoint), json.loads(json.dumps(current))
    problems = [
        f"cannot resume {checkpoint}: {_TITLES.get(name, name)} is {value!r}, but the checkpoint has "
        f"{stored[name]!r}; use the earlier value, or start a new run in another --output_dir"
        for name, value in current.items()
        if name in stored and stored[name] != value
    ]
    if problems:
        raise UsageError(problems)
