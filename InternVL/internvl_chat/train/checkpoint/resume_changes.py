"""Compare a run with the checkpoint that it resumes from; refuse, or with a flag allow, each difference."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_chat.train.checkpoint.fingerprint import (
    ANNOTATION,
    AUGMENTED,
    BEST,
    DEEPSPEED_RANKS,
    EXCLUDED,
    IMAGES,
    REPEATS,
    SET_SIZES,
    SETS,
    STEP_SIZE,
    TILE_LIMITS,
    TOTAL_STEPS,
    VALIDATION_FLAGS,
    read_fingerprint,
)
from internvl_chat.train.checkpoint.run_folder import checkpoint_step
from internvl_chat.train.checkpoint.saver import has_optimizer_state
from internvl_chat.utils.errors import UsageError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# Names in messages of the settings whose names in checkpoints are less clear.
_TITLES = {SET_SIZES: "records per dataset", STEP_SIZE: "global batch size (records per step)"}

_ORDER = "records would be trained twice or never"
_OPTIMIZER = "the optimizer state belongs to other parameters or to another optimizer"
_MODEL = "the weights were trained with it"
_REFUSED = {
    **dict.fromkeys(
        ("seed", "train_sampling_strategy", "use_data_resampling", STEP_SIZE, SET_SIZES, REPEATS),
        _ORDER,
    ),
    SETS: "names and order of the datasets identify the records",
    **dict.fromkeys(
        ("freeze_llm", "freeze_backbone", "freeze_mlp", "unfreeze_vit_layers", "unfreeze_lm_head",
         "use_llm_lora", "use_backbone_lora", "optim", "optim_args", "bf16", "weight precision", "DeepSpeed",
         DEEPSPEED_RANKS, "ZeRO stage", "DeepSpeed's optimizer", "DeepSpeed's scheduler"),
        _OPTIMIZER,
    ),
    **dict.fromkeys(
        ("vision_select_layer", "ps_version", "force_image_size", "down_sample_ratio"), _MODEL
    ),
    BEST: "the best validation so far was measured in another way",
}  # fmt: skip

_RATE = "the learning rate continues on the new schedule"
_READ = "records are read in the new way"
_FROM_NOW = "applies"
_ALLOWED = {
    **dict.fromkeys(
        (TOTAL_STEPS, "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"), _RATE
    ),
    **dict.fromkeys(
        ("conv_style", "max_seq_length", "pad2square", "dynamic_image_size", "use_thumbnail",
         "min_dynamic_patch", "max_dynamic_patch", "normalize_type", "truncate_text", "image_background",
         "exif_transpose", "escape_control_tokens", AUGMENTED, TILE_LIMITS, IMAGES),
        _READ,
    ),
    **dict.fromkeys(
        ("weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "loss_reduction",
         "lora_dropout", "drop_path_rate", *VALIDATION_FLAGS),
        _FROM_NOW,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """A setting that differs from the checkpoint's.

    Attributes:
        value: value in this run.
        stored: value in the checkpoint.
        refused: the reason why it cannot be allowed, if any.
    """

    name: str
    value: Any
    stored: Any
    refused: str | None

    def problem(self, checkpoint: Path) -> str:
        """Return the error message."""
        title = _TITLES.get(self.name, self.name)
        value, stored = _shown(self.value), _shown(self.stored)
        text = f"cannot resume {checkpoint}: {title} is {value}, but the checkpoint has {stored}"
        remedy = "use the earlier value, or start a new run in another --output_dir"
        if self.refused:
            return f"{text} ({self.refused}); {remedy}"
        return f"{text}; {remedy}, or allow the change with --allow_resume_changes True"

    def effect(self, step: int, rate: Callable[[], float]) -> str:
        """Return the change and its effect.

        Args:
            step: the next step.
            rate: returns the learning rate of the next step.
        """
        kind = _ALLOWED.get(self.name, _FROM_NOW)
        value = f": {rate():g}" if kind == _RATE else ""
        return f"{self.name} {_shown(self.stored)} -> {_shown(self.value)}: {kind} from step {step} on{value}"


def _shown(value: Any) -> str:
    """Return a value for messages, with hashes shortened."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1...", repr(value))


def check_resume(
    checkpoint: Path, current: Mapping[str, Any], *, allow_changes: bool, rate: Callable[[], float]
) -> list[str]:
    """Compare a run with the checkpoint that it resumes from.

    Args:
        current: the fingerprint of this run; the image files are compared later.
        allow_changes: allow differences that repeat or omit no records and fit to the optimizer state.
        rate: returns the learning rate of the next step.

    Returns:
        A line for each allowed change, and for what could not be compared.

    Raises:
        UsageError: lists all refused differences.
    """
    stored, step = read_fingerprint(checkpoint), checkpoint_step(checkpoint)
    current = json.loads(json.dumps(dict(current)))
    problems, differences = _compare(checkpoint, stored, current, allow_changes)
    start = f"cannot resume {checkpoint}:"
    if current.get(TOTAL_STEPS, step) < step:
        problems.append(
            f"{start} this run ends after step {current[TOTAL_STEPS]}; raise --max_steps "
            "(--num_train_epochs), or resume an earlier checkpoint"
        )
    has_optimizer = has_optimizer_state(checkpoint)
    if not has_optimizer and not allow_changes:
        problems.append(
            f"{start} it has no optimizer state (--save_only_model); start a new run in another --output_dir "
            f"with this checkpoint as --model_name_or_path, or continue with step {step + 1} and new "
            "optimizer state with --allow_resume_changes True"
        )
    if problems:
        raise UsageError(problems)
    lines = [difference.effect(step + 1, rate) for difference in differences]
    if not has_optimizer:
        lines.append(
            f"{checkpoint} has no optimizer state: its moments start at zero in step {step + 1}, and float32 "
            f"master weights at the saved weights; the learning rate is that of the schedule: {rate():g}"
        )
    missing = _not_compared(stored, {**current, IMAGES: None})
    if missing:
        lines.append(
            f"{checkpoint} was written by an earlier version, which did not store {', '.join(missing)}; "
            "this was not compared"
        )
    return lines


def check_images(checkpoint: Path, images: Mapping[str, str], *, allow_changes: bool) -> list[str]:
    """Compare the image files of the datasets with those of a checkpoint's run; like `check_resume`.

    Args:
        images: digest of the image files of each dataset.

    Raises:
        UsageError: they differ.
    """
    current = {IMAGES: dict(images)}
    problems, differences = _compare(checkpoint, read_fingerprint(checkpoint), current, allow_changes)
    if problems:
        raise UsageError(problems)
    return [difference.effect(checkpoint_step(checkpoint) + 1, lambda: 0.0) for difference in differences]


def _compare(
    checkpoint: Path, stored: Mapping[str, Any], current: Mapping[str, Any], allow_changes: bool
) -> tuple[list[str], list[Difference]]:
    """Return the problems of the refused differences, and all differences."""
    differences = list(_differences(stored, current))
    refused = [d for d in differences if d.refused or not allow_changes]
    return [difference.problem(checkpoint) for difference in refused], differences


def _differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> Iterator[Difference]:
    for name in (name for name in current if name in stored and name != EXCLUDED):
        value, before = current[name], stored[name]
        if name == "max_dynamic_patch" and TILE_LIMITS in stored:
            continue  # the limits of the datasets tell more
        if name in (REPEATS, AUGMENTED, TILE_LIMITS, IMAGES):  # other datasets are a difference by themselves
            names = [key for key in value if key in before and value[key] != before[key]]
            value, before = ({key: values[key] for key in names} for values in (value, before))
        if value != before:
            yield Difference(name, value, before, _refusal(name, value, before))


def _refusal(name: str, value: Any, stored: Any) -> str | None:
    if name.startswith(ANNOTATION):
        return _ORDER
    if name == BEST and None in (value, stored):
        return None  # there is no best validation so far, or it is no longer needed
    return None if name in _ALLOWED else _REFUSED[name]


def _not_compared(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return the settings of this run that an earlier version did not store."""
    known = {EXCLUDED, BEST, *(name for name in current if name.startswith(ANNOTATION))}
    if BEST in stored:
        known |= set(VALIDATION_FLAGS)  # stored if they were used
    return [name for name in current if name not in stored and name not in known]
