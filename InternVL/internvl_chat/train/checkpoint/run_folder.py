"""The output folder of a run: who may write to it, what an earlier run left there, where to resume."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from internvl_chat.convert.model_card import CARD, CARD_MARK
from internvl_chat.train.checkpoint.manifest import find_damage
from internvl_chat.utils.errors import UsageError
from internvl_chat.utils.folder_lock import LOCK, lock_folder
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

METRICS = "metrics.jsonl"
LEDGER = "ledger.jsonl"
VALIDATION = "validation.jsonl"
CONFIG = "config.yaml"
LOG = "training_log.txt"
PLOT = "loss.png"
FINISHED = "train_results.json"
PARTIAL = ".partial"
# Suffix, in PARTIAL, of a checkpoint that is being replaced by one of the same step.
FORMER = ".former"

_LOGS = (METRICS, LEDGER, VALIDATION)
# Trackers write to folders of their own.
_HARMLESS = (LOG, LOCK, CARD, "runs", "wandb")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Files that a run writes; others in its folder belong to the user.
_WRITTEN = re.compile(
    r"checkpoint-\d+|\.partial|(metrics|ledger|validation)\.jsonl|config\.yaml|loss\.png|train_results\.json|"
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|adapter_model\.safetensors|"
    r"(config|adapter_config|base_model|preprocessing|generation_config|preprocessor_config|tokenizer|"
    r"tokenizer_config|vocab|added_tokens|special_tokens_map|chat_template)\.json|merges\.txt|"
    r"tokenizer\.model|chat_template\.jinja"
)


@dataclass(frozen=True)
class OutputFolder:
    """An output folder as it was found.

    Attributes:
        path: the folder.
        resume: checkpoint to resume from; None to start from the beginning.
        overwrite: delete an earlier run's files first.
        found: checkpoints and results that were there when this was decided.
    """

    path: Path
    resume: Path | None
    overwrite: bool
    found: tuple[str, ...] = ()

    def open(self) -> FileLock:
        """Make the folder, take its lock, and delete what must not stay; returns the lock to keep.

        Raises:
            UsageError: another process writes to the folder, or has done so since it was inspected, or it
                cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(self.path)
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be written to: {error.strerror}") from None
        if _results(self.path) != self.found:
            lock.release()
            raise UsageError(
                f"{self.path}: another run has written to this folder while this one was starting; start the "
                "same command again to resume from what is there now"
            )
        shutil.rmtree(self.path / PARTIAL, ignore_errors=True)
        if self.resume is None and may_write_card(self.path):
            _delete(self.path / CARD)
        if self.overwrite:
            names = sorted(p.name for p in self.path.iterdir() if _WRITTEN.fullmatch(p.name))
            if names:
                logger.warning("%s: deleting an earlier run (%s)", self.path, ", ".join(names))
        else:
            names = [FINISHED] if self.resume else [*_LOGS, CONFIG, PLOT, FINISHED]
        for name in names:
            _delete(self.path / name)
        if self.resume:
            self._go_back(checkpoint_step(self.resume))
        return lock

    def _go_back(self, step: int) -> None:
        """Delete checkpoints and log lines after a step."""
        for later in list_checkpoints(self.path):
            if checkpoint_step(later) > step:
                logger.warning("going back to step %d: deleting %s", step, later)
                shutil.rmtree(later)
        for name in _LOGS:
            _drop_after(self.path / name, step)
        if self.resume.resolve().parent == self.path.resolve():
            _look_for_gaps(self.path / LEDGER, step)


def may_write_card(folder: Path) -> bool:
    """Return whether a folder has no model card, or one that an earlier run has written."""
    file = folder / CARD
    return not file.exists() or CARD_MARK in file.read_text(encoding="utf-8", errors="replace")


def inspect_output_folder(
    path: Path, *, overwrite: bool, resume: str | None, inputs: Sequence[Path] = ()
) -> OutputFolder:
    """Decide what to do with an output folder, without changing any result.

    An unfinished run is resumed from its newest undamaged checkpoint, as in the reference.

    Args:
        path: the folder; may be missing.
        overwrite: start from the beginning whatever an earlier run left.
        resume: a checkpoint folder; `auto` or `True` for the newest; None to decide by what is there.
        inputs: files and folders that the run reads; none of them may be overwritten.

    Raises:
        UsageError: the folder is in use, or there is nothing to resume from.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path}: is a file; choose another --output_dir")
    for former in (path / PARTIAL).glob("*" + FORMER):
        # The process was killed after it moved this checkpoint aside, before the new one had its name.
        if not (path / former.stem).exists():
            former.replace(path / former.stem)
    checkpoints, found = list_checkpoints(path), _results(path)
    contents = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    foreign = [name for name in contents if not _WRITTEN.fullmatch(name) and name not in _HARMLESS]
    if resume and resume.lower() not in ("auto", "true"):
        chosen = Path(resume)
        problem = _resume_problem(chosen) if chosen.is_dir() else "no such folder"
        if problem:
            raise UsageError(f"--resume_from_checkpoint {resume}: not a complete checkpoint: {problem}")
        elsewhere = chosen.resolve().parent != path.resolve()
        if elsewhere and (checkpoints or foreign or METRICS in contents):
            raise UsageError(f"{path}: is not empty; choose a new --output_dir to resume {resume} in")
        return OutputFolder(path, chosen, overwrite=False, found=found)
    if overwrite:
        if resume:
            raise UsageError("--overwrite_output_dir would delete the checkpoint to resume; drop one of them")
        if contents and METRICS not in contents and not set(contents) <= {*_HARMLESS, CONFIG}:
            raise UsageError(
                f"{path}: holds no run of this program, and --overwrite_output_dir deletes no others"
            )
        needed = [p for p in inputs if p.resolve() == path.resolve() or path.resolve() in p.resolve().parents]
        if needed:
            raise UsageError(f"--overwrite_output_dir would delete {needed[0]}, which this run reads")
        return OutputFolder(path, None, overwrite=True, found=found)
    if FINISHED in contents and not resume:
        raise UsageError(
            f"{path}: this output folder holds a finished run; choose another --output_dir, or "
            "--overwrite_output_dir True to delete it"
        )
    if checkpoints:
        return OutputFolder(path, _newest_whole(checkpoints), overwrite=False, found=found)
    if resume and resume.lower() == "true":
        raise UsageError(f"--resume_from_checkpoint: {path} holds no checkpoint")
    in_use = foreign or [name for name in contents if name.endswith(".safetensors")]
    if in_use:
        raise UsageError(
            f"{path}: this output folder is in use (it holds {', '.join(in_use[:3])}); choose another "
            "--output_dir, or --overwrite_output_dir True to delete an earlier run in it"
        )
    return OutputFolder(path, None, overwrite=False, found=found)


def _results(path: Path) -> tuple[str, ...]:
    """Return the names of a folder's checkpoints, and of what only a finished run has."""
    finished = [FINISHED] if (path / FINISHED).exists() else []
    return (*(checkpoint.name for checkpoint in list_checkpoints(path)), *finished)


def _newest_whole(checkpoints: Sequence[Path]) -> Path:
    """Return the newest checkpoint that is as it was written.

    Raises:
        UsageError: there is none; names what is wrong with each.
    """
    problems = []
    for checkpoint in reversed(checkpoints):
        problem = _resume_problem(checkpoint)
        if problem is None:
            logger.info("resuming from %s", checkpoint)
            return checkpoint
        logger.warning("%s is damaged and not used: %s", checkpoint, problem)
        problems.append(f"{checkpoint} is damaged: {problem}")
    remedy = "--overwrite_output_dir True deletes them and starts from the beginning"
    raise UsageError([*problems, f"there is no complete checkpoint to resume from; {remedy}"])


def _resume_problem(checkpoint: Path) -> str | None:
    """Return why a run cannot resume from a checkpoint."""
    if (checkpoint / "optimizer.pt").is_file():
        return (
            "its optimizer state is of an earlier version of this program; start a new run with it as "
            "--model_name_or_path"
        )
    return find_damage(checkpoint)


def list_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints of a folder, oldest first."""
    if not path.is_dir():
        return []
    folders = (p for p in path.iterdir() if _CHECKPOINT.fullmatch(p.name) and p.is_dir())
    return sorted(folders, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """Return the optimizer steps done at a checkpoint, by its name, or by its state if it was renamed."""
    named = _CHECKPOINT.fullmatch(checkpoint.name)
    if named:
        return int(named[1])
    return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _drop_after(path: Path, step: int) -> None:
    """Delete the lines of later steps."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _step_of(line) is not None and _step_of(line) <= step]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    partial.replace(path)


def _look_for_gaps(ledger: Path, step: int) -> None:
    """Warn if a ledger lacks lines of steps up to that one."""
    lines = ledger.read_text(encoding="utf-8").splitlines() if ledger.is_file() else []
    missing = sorted(set(range(1, step + 1)) - {_step_of(line) for line in lines})
    if missing:
        logger.warning(
            "%s: has no line of %d steps of this run, the first of them %d; their records follow from the "
            "seed, but are not on record", ledger, len(missing), missing[0],
        )  # fmt: skip


def _step_of(line: str) -> int | None:
    """Return a line's step; None if a crash truncated the line."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
