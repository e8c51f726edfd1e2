"""Find the checkpoint with the best validation metric and copy its model."""

import math
import shutil
from pathlib import Path

from internvl_chat.train.checkpoint.fingerprint import FINGERPRINT
from internvl_chat.train.checkpoint.manifest import MANIFEST, find_damage
from internvl_chat.train.checkpoint.run_folder import checkpoint_step, list_checkpoints
from internvl_chat.train.checkpoint.state import STATE_FILE, TrainState, read_state_file
from internvl_chat.utils.errors import TrainingError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# Files of a checkpoint that are needed only to resume. They are not copied, and neither are subfolders.
_RESUME_FILES = (STATE_FILE, FINGERPRINT, MANIFEST)


def find_best(folder: Path, last: float = math.inf) -> Path | None:
    """Return the newest checkpoint that was the best of its run when it was written, or None.

    Args:
        last: ignore checkpoints after this step.
    """
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            best = read_state_file(checkpoint)["best_global_step"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if best == checkpoint_step(checkpoint) <= last:
            return checkpoint
    return None


def copy_best(state: TrainState, output: Path, resume: Path | None) -> int:
    """Copy the model of the best checkpoint to the output folder; return the step of the checkpoint.

    Args:
        resume: checkpoint that the run resumed from, if any. If the output folder has no best checkpoint,
            `resume` and the earlier checkpoints next to it are searched.

    Raises:
        TrainingError: there was no validation, or the best checkpoint is missing or damaged.
    """
    best = find_best(output)
    if best is None and resume is not None:
        best = find_best(resume.parent, checkpoint_step(resume))
    if best is None:
        missing = f"checkpoint-{state.best_step} is missing or damaged"
        problem = "there was no validation" if state.best_step is None else missing
    elif damage := find_damage(best):
        problem = f"{best}: {damage}"
    else:
        step = checkpoint_step(best)
        if step != state.best_step:
            logger.warning(
                "the checkpoint with the best validation metric (step %d) is missing", state.best_step
            )
        logger.info("copying the best model from %s", best)
        for file in sorted(best.iterdir()):
            if file.is_file() and file.name not in _RESUME_FILES:
                shutil.copyfile(file, output / file.name)
        return step
    raise TrainingError(
        f"there is no best model to copy ({problem}); to save the last model instead, run the same command "
        "with --load_best_model_at_end False"
    )
