"""The checkpoint that validation found best, as the model that a run ends with."""

import re
import shutil
from pathlib import Path

from transformers import TrainerState

from internvl_chat.train.checkpoint.manifest import find_damage
from internvl_chat.utils.errors import TrainingError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# What a run needs to go on, and a model does not.
_STATE = re.compile(
    r"(optimizer|scheduler|scaler)\.pt|rng_state.*\.pth|trainer_state\.json|training_args\.bin|"
    r"run_fingerprint\.json|manifest\.json|latest|zero_to_fp32\.py"
)


def copy_best(state: TrainerState, output: Path, resume: Path | None) -> int:
    """Copy the model of a run's best checkpoint into its folder; returns the step of it.

    Args:
        state: of the trainer, if it has trained at all.
        output: folder of the run.
        resume: checkpoint that the run went on from; the best may be older and beside it.

    Raises:
        TrainingError: no validation found a best one, or it is damaged or gone.
    """
    if resume is not None and not state.global_step:
        state = TrainerState.load_from_json(str(resume / "trainer_state.json"))
    folders = [output] if resume is None else [output, resume.parent]
    problems = []
    for folder in folders if state.best_global_step else ():
        checkpoint = folder / f"checkpoint-{state.best_global_step}"
        damage = find_damage(checkpoint) if checkpoint.is_dir() else "it is missing"
        if damage is None:
            logger.info("the finished model is the best one, %s (%s)", checkpoint, state.best_metric)
            _copy_model(checkpoint, output)
            return state.best_global_step
        problems.append(f"{checkpoint}: {damage}")
    raise TrainingError(
        f"there is no best model to end with ({'; '.join(problems) or 'nothing was validated'}); with "
        "--load_best_model_at_end False the same command writes the newest model"
    )


def _copy_model(checkpoint: Path, target: Path) -> None:
    """Copy the files of a checkpoint but those that only a run needs."""
    for file in sorted(checkpoint.iterdir()):
        if file.is_file() and not _STATE.fullmatch(file.name):
            shutil.copyfile(file, target / file.name)
