"""Compare a run with the checkpoint that it resumes from.

By default, every difference is an error. `--allow_resume_changes` permits some of them.
"""

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
    EVAL_IMAGES,
    EVAL_TILE_LIMITS,
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

# Stored name of a setting -> clearer name for messages.
_TITLES = {SET_SIZES: "records per dataset", STEP_SIZE: "global batch size (records per step)"}

_ORDER = "some records would be used twice or never"
_OPTIMIZER = "the optimizer state belongs to different parameters or a different optimizer"
_MODEL = "the weights were trained with the earlier value"
_REJECTED = {
    **dict.fromkeys(
        ("seed", "train_sampling_strategy", "use_data_resampling", STEP_SIZE, SET_SIZES, REPEATS),
        _ORDER,
    ),
    SETS: "records are identified by the names and the order of the datasets",
    **dict.fromkeys(
        ("freeze_llm", "freeze_backbone", "freeze_mlp", "unfreeze_vit_layers", "unfreeze_lm_head",
         "use_llm_lora", "use_backbone_lora", "use_dora", "use_rslora", "load_in_4bit", "vision_lr",
         "projector_lr", "llm_lr", "loraplus_lr_ratio", "optim", "optim_args", "bf16", "weight precision",
         "DeepSpeed", DEEPSPEED_RANKS, "ZeRO stage", "DeepSpeed's optimizer", "DeepSpeed's scheduler"),
        _OPTIMIZER,
    ),
    **dict.fromkeys(
        ("vision_select_layer", "ps_version", "force_image_size", "down_sample_ratio"), _MODEL
    ),
    **dict.fromkeys(
        (BEST, EVAL_TILE_LIMITS, EVAL_IMAGES), "the best metric so far was measured differently"
    ),
}  # fmt: skip

_RATE = "the learning rate follows the new schedule"
_READ = "records are read with the new value"
_FROM_NOW = "takes effect"
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
    """A setting that differs between this run and the checkpoint.

    Attributes:
        value: value in this run.
        stored: value in the checkpoint.
        rejected: why the difference cannot be allowed; None if it can.
    """

    name: str
    value: Any
    stored: Any
    rejected: str | None

    def problem(self, checkpoint: Path) -> str:
        """Return an error message with a remedy."""
        title = _TITLES.get(self.name, self.name)
        value, stored = _shown(self.value), _shown(self.stored)
        text = f"cannot resume {checkpoint}: {title} is {value}, but the checkpoint has {stored}"
        remedy = "use the earlier value, or start a new run in a different --output_dir"
        if self.rejected:
            return f"{text} ({self.rejected}); {remedy}"
        return f"{text}; {remedy}, or allow the change with --allow_resume_changes True"

    def effect(self, step: int, rate: Callable[[], float]) -> str:
        """Return a log line that describes the change and its effect.

        Args:
            step: first step of the resumed run.
            rate: function that returns the learning rate at that step.
        """
        kind = _ALLOWED.get(self.name, _FROM_NOW)
        value = f": {rate():g}" if kind == _RATE else ""
        return f"{self.name} {_shown(self.stored)} -> {_shown(self.value)}: {kind} from step {step} on{value}"


def _shown(value: Any) -> str:
    """Format a value for messages; hashes are shortened."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1...", repr(value))


def check_resume(
    checkpoint: Path, current: Mapping[str, Any], *, allow_changes: bool, rate: Callable[[], float]
) -> list[str]:
    """Compare a run with the checkpoint that it resumes from.

    Args:
        current: fingerprint of this run; `check_images` compares the image files later.
        allow_changes: allow differences that keep the order of the records and the optimizer state valid.
        rate: function that returns the learning rate at the next step.

    Returns:
        Log lines: one for each allowed change, one if optimizer state is missing, and one if the checkpoint
        lacks settings to compare.

    Raises:
        UsageError: the run cannot resume; the message lists all reasons.
    """
    stored, step = read_fingerprint(checkpoint), checkpoint_step(checkpoint)
    current = json.loads(json.dumps(dict(current)))
    problems, differences = _compare(checkpoint, stored, current, allow_changes)
    start = f"cannot resume {checkpoint}:"
    if current.get(TOTAL_STEPS, step) < step:
        problems.append(
            f"{start} this run ends after step {current[TOTAL_STEPS]}, before that checkpoint; increase "
            "--max_steps or --num_train_epochs, or resume from an earlier checkpoint"
        )
    has_optimizer = has_optimizer_state(checkpoint)
    if not has_optimizer and not allow_changes:
        problems.append(
            f"{start} it has no optimizer state (--save_only_model); start a new run in a different "
            f"--output_dir with this checkpoint as --model_name_or_path, or continue at step {step + 1} with "
            "new optimizer state: --allow_resume_changes True"
        )
    if problems:
        raise UsageError(problems)
    lines = [difference.effect(step + 1, rate) for difference in differences]
    if not has_optimizer:
        lines.append(
            f"{checkpoint} has no optimizer state: moments start at zero in step {step + 1}, and float32 "
            f"master weights are copied from the saved weights. The learning rate follows the "
            f"schedule: {rate():g}"
        )
    images = [IMAGES, EVAL_IMAGES] if EVAL_TILE_LIMITS in current else [IMAGES]
    missing = _not_compared(stored, {**current, **dict.fromkeys(images)})
    if missing:
        lines.append(
            f"{checkpoint} was written by an earlier version, which did not store {', '.join(missing)}; "
            "these settings were not compared"
        )
    return lines


def check_images(
    checkpoint: Path,
    images: Mapping[str, str],
    eval_images: Mapping[str, str] | None = None,
    *,
    allow_changes: bool,
) -> list[str]:
    """Compare the image files with those recorded in a checkpoint; return a log line per allowed change.

    Args:
        images: digest of the image files of each training dataset, keyed by dataset name.
        eval_images: the same for the validation datasets; None if no best checkpoint is tracked.

    Raises:
        UsageError: training images differ and `allow_changes` is False, or validation images differ.
    """
    current = {IMAGES: dict(images)} | ({} if eval_images is None else {EVAL_IMAGES: dict(eval_images)})
    problems, differences = _compare(checkpoint, read_fingerprint(checkpoint), current, allow_changes)
    if problems:
        raise UsageError(problems)
    return [difference.effect(checkpoint_step(checkpoint) + 1, lambda: 0.0) for difference in differences]


def _compare(
    checkpoint: Path, stored: Mapping[str, Any], current: Mapping[str, Any], allow_changes: bool
) -> tuple[list[str], list[Difference]]:
    """Return an error message for each rejected difference, and a list of all differences."""
    differences = list(_differences(stored, current))
    rejected = [d for d in differences if d.rejected or not allow_changes]
    return [difference.problem(checkpoint) for difference in rejected], differences


def _differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> Iterator[Difference]:
    for name in (name for name in current if name in stored and name != EXCLUDED):
        value, before = current[name], stored[name]
        if name == "max_dynamic_patch" and TILE_LIMITS in stored:
            continue  # the limit of each dataset is compared instead
        if name in (REPEATS, AUGMENTED, TILE_LIMITS, IMAGES):  # added and removed datasets differ in SETS
            names = [key for key in value if key in before and value[key] != before[key]]
            value, before = ({key: values[key] for key in names} for values in (value, before))
        if value != before:
            yield Difference(name, value, before, _rejection(name, value, before))


def _rejection(name: str, value: Any, stored: Any) -> str | None:
    """Return why a difference cannot be allowed; None if it can."""
    if name.startswith(ANNOTATION):
        return _ORDER
    if name == BEST and None in (value, stored):
        return None  # there is no best metric so far, or it is no longer needed
    return None if name in _ALLOWED else _REJECTED[name]


def _not_compared(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return the settings that cannot be compared, because an earlier version did not store them."""
    known = {EXCLUDED, BEST, *(name for name in current if name.startswith(ANNOTATION))}
    if BEST in stored:
        known |= set(VALIDATION_FLAGS)  # stored only if they were used
    if stored.get(BEST) is None:
        known |= {EVAL_TILE_LIMITS, EVAL_IMAGES}  # there is no best metric so far
    return [name for name in current if name not in stored and name not in known]
