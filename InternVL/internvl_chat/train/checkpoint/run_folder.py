"""Inspect and prepare the output folder: find the checkpoint to resume from and protect unrelated files."""

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
from internvl_chat.utils.text import counted

logger = get_logger(__name__)

METRICS = "metrics.jsonl"
LEDGER = "ledger.jsonl"
VALIDATION = "validation.jsonl"
SAMPLES = "samples.jsonl"
SESSIONS = "sessions.jsonl"
CONFIG = "config.yaml"
LOG = "training_log.txt"
PLOT = "loss.png"
REPORT = "report.html"
FINISHED = "train_results.json"
PARTIAL = ".partial"

_LOGS = (METRICS, LEDGER, VALIDATION, SAMPLES, SESSIONS)
# Files and folders that may exist before a run starts: log, lock, model card and tracker folders.
_HARMLESS = (LOG, LOCK, CARD, "runs", "wandb")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Files and folders of a run, which `OutputFolder.open` deletes when it overwrites the run.
_WRITTEN = re.compile(
    r"checkpoint-\d+|\.partial|(metrics|ledger|validation|samples|sessions)\.jsonl|config\.yaml|loss\.png|"
    r"report\.html|train_results\.json|"
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|adapter_model\.safetensors|"
    r"(LICENSE|LICENCE|COPYING|NOTICE).*|"
    r"(config|adapter_config|base_model|preprocessing|generation_config|preprocessor_config|processor_config|"
    r"video_preprocessor_config|tokenizer|"
    r"tokenizer_config|vocab|added_tokens|special_tokens_map|chat_template)\.json|merges\.txt|"
    r"tokenizer\.model|chat_template\.jinja"
)


@dataclass(frozen=True)
class OutputFolder:
    """Output folder of a run, and whether the run starts, resumes or overwrites an earlier one.

    Attributes:
        resume: checkpoint to resume from; None to start a new run.
        overwrite: whether `open` deletes an earlier run.
        results: names of the checkpoints and the results file when the folder was inspected.
    """

    path: Path
    resume: Path | None
    overwrite: bool
    results: tuple[str, ...] = ()

    def open(self) -> FileLock:
        """Create and lock the folder, delete outdated files and log lines, and return the lock.

        Raises:
            UsageError: the folder cannot be created, another process is using it, or its results have changed
                since it was inspected.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(self.path)
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be written to: {error.strerror}") from None
        if _results(self.path) != self.results:
            lock.release()
            raise UsageError(
                f"{self.path}: another run wrote to this folder while this one was starting; run the same "
                "command again to resume that run"
            )
        shutil.rmtree(self.path / PARTIAL, ignore_errors=True)
        if self.resume is None and may_write_card(self.path):
            _delete(self.path / CARD)
        if self.overwrite:
            names = sorted(p.name for p in self.path.iterdir() if _WRITTEN.fullmatch(p.name))
            if names:
                logger.warning("%s: deleting an earlier run (%s)", self.path, ", ".join(names))
        else:
            names = [FINISHED] if self.resume else [*_LOGS, CONFIG, PLOT, REPORT, FINISHED]
        for name in names:
            _delete(self.path / name)
        if self.resume:
            self._rewind(checkpoint_step(self.resume))
        return lock

    def _rewind(self, step: int) -> None:
        """Delete all checkpoints and log lines that are newer than the given step."""
        for checkpoint in list_checkpoints(self.path):
            if checkpoint_step(checkpoint) > step:
                logger.warning("resuming from step %d: deleting %s", step, checkpoint)
                shutil.rmtree(checkpoint)
        for name in _LOGS:
            _truncate_log(self.path / name, step)
        if self.resume and self.resume.resolve().parent == self.path.resolve():
            _warn_about_gaps(self.path / LEDGER, step)


def may_write_card(folder: Path) -> bool:
    """Return whether a folder has no model card or one written by an earlier run."""
    file = folder / CARD
    return not file.exists() or CARD_MARK in file.read_text(encoding="utf-8", errors="replace")


def inspect_output_folder(
    path: Path, *, overwrite: bool, resume: str | None, inputs: Sequence[Path] = ()
) -> OutputFolder:
    """Choose whether to start, resume or overwrite a run, depending on the content of its output folder.

    As in the reference, an unfinished run resumes from its newest intact checkpoint by default.

    Args:
        resume: checkpoint folder, or one of: `True` (newest checkpoint), `auto` (newest checkpoint, if any),
            None (like `auto`, but a finished run is an error).
        inputs: files and folders that the run reads, which must not be overwritten.

    Raises:
        UsageError: the folder contains a finished run or other files, overwriting would delete inputs of the
            run, or there is no checkpoint to resume from.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path}: is a file; choose a different --output_dir")
    checkpoints, results = list_checkpoints(path), _results(path)
    contents = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    foreign = [name for name in contents if not _WRITTEN.fullmatch(name) and name not in _HARMLESS]
    if resume and resume.lower() not in ("auto", "true"):
        checkpoint = Path(resume)
        problem = _resume_problem(checkpoint) if checkpoint.is_dir() else "no such folder"
        if problem:
            raise UsageError(f"--resume_from_checkpoint {resume}: cannot resume: {problem}")
        elsewhere = checkpoint.resolve().parent != path.resolve()
        if elsewhere and (checkpoints or foreign or METRICS in contents):
            raise UsageError(f"{path}: is not empty; choose a different --output_dir to resume {resume}")
        return OutputFolder(path, checkpoint, overwrite=False, results=results)
    if overwrite:
        if resume:
            raise UsageError(
                "--overwrite_output_dir would delete the checkpoint to resume from; remove one of the flags"
            )
        if contents and METRICS not in contents and not set(contents) <= {*_HARMLESS, CONFIG}:
            raise UsageError(f"{path}: contains no training run; --overwrite_output_dir only deletes runs")
        needed = [p for p in inputs if p.resolve() == path.resolve() or path.resolve() in p.resolve().parents]
        if needed:
            raise UsageError(f"--overwrite_output_dir would delete {needed[0]}, which this run reads")
        return OutputFolder(path, None, overwrite=True, results=results)
    if FINISHED in contents and not resume:
        raise UsageError(
            f"{path}: this output folder contains a finished run; choose a different --output_dir, delete "
            "the run with --overwrite_output_dir True, or continue it with more steps: "
            "--resume_from_checkpoint True --allow_resume_changes True"
        )
    if checkpoints:
        return OutputFolder(path, _newest_intact(checkpoints), overwrite=False, results=results)
    if resume and resume.lower() == "true":
        raise UsageError(f"--resume_from_checkpoint: {path} contains no checkpoint")
    in_use = foreign or [name for name in contents if name.endswith(".safetensors")]
    if in_use:
        raise UsageError(
            f"{path}: this output folder is in use (it contains {', '.join(in_use[:3])}); choose a different "
            "--output_dir, or pass --overwrite_output_dir True to delete an earlier run in it"
        )
    return OutputFolder(path, None, overwrite=False, results=results)


def _results(path: Path) -> tuple[str, ...]:
    """Return the names of the checkpoints in a folder and, if the run has finished, of its results file."""
    finished = [FINISHED] if (path / FINISHED).exists() else []
    return (*(checkpoint.name for checkpoint in list_checkpoints(path)), *finished)


def _newest_intact(checkpoints: Sequence[Path]) -> Path:
    """Return the newest checkpoint from which a run can resume.

    Raises:
        UsageError: there is none; the message lists the problem of each checkpoint.
    """
    problems = []
    for checkpoint in reversed(checkpoints):
        problem = _resume_problem(checkpoint)
        if problem is None:
            logger.info("resuming from %s", checkpoint)
            return checkpoint
        logger.warning("skipping checkpoint %s: %s", checkpoint, problem)
        problems.append(f"{checkpoint}: cannot resume: {problem}")
    remedy = "--overwrite_output_dir True deletes all checkpoints and starts a new run"
    raise UsageError([*problems, f"there is no checkpoint to resume from; {remedy}"])


def _resume_problem(checkpoint: Path) -> str | None:
    """Return why a run cannot resume from a checkpoint; None if it can."""
    if (checkpoint / "optimizer.pt").is_file():
        return (
            "its optimizer state was written by an earlier version of this program; start a new run with "
            "this checkpoint as --model_name_or_path"
        )
    return find_damage(checkpoint)


def list_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoint folders in an output folder, in the order of their steps."""
    if not path.is_dir():
        return []
    folders = (p for p in path.iterdir() if _CHECKPOINT.fullmatch(p.name) and p.is_dir())
    return sorted(folders, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """Return the step of a checkpoint from its name, or from its state file if it was renamed."""
    named = _CHECKPOINT.fullmatch(checkpoint.name)
    if named:
        return int(named[1])
    return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _truncate_log(path: Path, step: int) -> None:
    """Remove incomplete log lines, and those of steps after the given one."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if (number := _step_of(line)) is not None and number <= step]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    partial.replace(path)


def _warn_about_gaps(ledger: Path, step: int) -> None:
    """Warn if the ledger lacks an entry for any step up to the given one."""
    lines = ledger.read_text(encoding="utf-8").splitlines() if ledger.is_file() else []
    missing = sorted(set(range(1, step + 1)) - {_step_of(line) for line in lines})
    if missing:
        logger.warning(
            "%s: no entry for %s (first: step %d). Their records can be reconstructed from the seed.",
            ledger, counted(len(missing), "step"), missing[0],
        )  # fmt: skip


def _step_of(line: str) -> int | None:
    """Return the step of a log line, or None if the line is incomplete because of a crash."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
