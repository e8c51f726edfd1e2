"""The checkpoint with the best validation, as the model that a run ends with."""

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

# Files that a run resumes from; what else it needs is in folders.
_RUN_FILES = (STATE_FILE, FINGERPRINT, MANIFEST)


def find_best(folder: Path, last: float = math.inf) -> Path | None:
    """Return the newest checkpoint that had the best validation when it was written; None if there is none.

    A better one that could not be written is not counted.

    Args:
        folder: of a run.
        last: step of the last checkpoint to look at.
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
    """Copy the model of a run's best checkpoint into the run's folder; returns its step.

    Args:
        state: of the run.
        output: folder of the run.
        resume: checkpoint that the run resumed from; the best may be older and beside it.

    Raises:
        TrainingError: no validation found a best one, or it is damaged or missing.
    """
    best = find_best(output)
    if best is None and resume is not None:
        best = find_best(resume.parent, checkpoint_step(resume))
    if best is None:
        missing = f"checkpoint-{state.best_step} is missing or damaged"
        problem = "nothing was validated" if state.best_step is None else missing
    elif damage := find_damage(best):
        problem = f"{best}: {damage}"
    else:
        step = checkpoint_step(best)
        if step != state.best_step:
            logger.warning("the best validation was at step %d, whose checkpoint is missing", state.best_step)
        logger.info("the finished model is the best one, %s", best)
        for file in sorted(best.iterdir()):
            if file.is_file() and file.name not in _RUN_FILES:
                shutil.copyfile(file, output / file.name)
        return step
    raise TrainingError(
        f"there is no best model to end with ({problem}); with "
        "--load_best_model_at_end False the same command writes the newest model"
    )
