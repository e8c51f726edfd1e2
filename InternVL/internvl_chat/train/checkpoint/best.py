"""The checkpoint with the best validation, as the model that a run ends with."""

import shutil
from pathlib import Path

from internvl_chat.train.checkpoint.fingerprint import FINGERPRINT
from internvl_chat.train.checkpoint.manifest import MANIFEST, find_damage
from internvl_chat.train.checkpoint.state import STATE_FILE, TrainState
from internvl_chat.utils.errors import TrainingError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# Files that a run resumes from; what else it needs is in folders.
_RUN_FILES = (STATE_FILE, FINGERPRINT, MANIFEST)


def copy_best(state: TrainState, output: Path, resume: Path | None) -> int:
    """Copy the model of a run's best checkpoint into the run's folder; returns its step.

    Args:
        state: of the run.
        output: folder of the run.
        resume: checkpoint that the run resumed from; the best may be older and beside it.

    Raises:
        TrainingError: no validation found a best one, or it is damaged or missing.
    """
    problems = []
    for folder in dict.fromkeys((output, resume.parent if resume else output)) if state.best_step else ():
        checkpoint = folder / f"checkpoint-{state.best_step}"
        damage = find_damage(checkpoint) if checkpoint.is_dir() else "it is missing"
        if damage is None:
            logger.info("the finished model is the best one, %s (%s)", checkpoint, state.best_metric)
            for file in sorted(checkpoint.iterdir()):
                if file.is_file() and file.name not in _RUN_FILES:
                    shutil.copyfile(file, output / file.name)
            return state.best_step
        problems.append(f"{checkpoint}: {damage}")
    raise TrainingError(
        f"there is no best model to end with ({'; '.join(problems) or 'nothing was validated'}); with "
        "--load_best_model_at_end False the same command writes the newest model"
    )
