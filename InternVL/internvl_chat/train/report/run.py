"""Read the output folder of a run, which may be unfinished, damaged or from another machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from internvl_chat.train.checkpoint.run_folder import (
    CONFIG,
    FINISHED,
    LEDGER,
    LOG,
    METRICS,
    SAMPLES,
    SESSIONS,
    VALIDATION,
)
from internvl_chat.train.report.log import LogMessage, read_log
from internvl_chat.train.report.steps import Steps, count, number, parse_lines, read_steps_file
from internvl_chat.utils.errors import UsageError
from internvl_chat.utils.files import is_file
from internvl_chat.utils.text import counted

# Name of the metrics over all validation records.
ALL = "all records"
# A run has at least one of these files.
_RUN_FILES = (CONFIG, METRICS, SESSIONS, FINISHED)


@dataclass(frozen=True)
class Session:
    """A start of the run, from a row of `sessions.jsonl`; see `monitor.session`."""

    step: int
    started: str
    total_steps: int
    description: str
    parameters: int
    trained_parameters: int
    git: str | None
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]
    data: Sequence[Mapping[str, Any]]
    validation_data: Sequence[Mapping[str, Any]]


class ValidationRow(NamedTuple):
    """Result of a validation.

    Attributes:
        scores: metrics of all records (`ALL`) and of each dataset; NaN if unknown.
    """

    step: int
    scores: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Sample:
    """Answer to a validation record, from a row of `samples.jsonl`; see `Validation`."""

    step: int
    dataset: str
    index: int
    images: Sequence[Path]
    question: str
    reference: str
    answer: str
    truncated: bool


@dataclass(frozen=True)
class UnusableRecord:
    """Record that was excluded before training (step 0) or skipped in a step."""

    step: int
    dataset: str
    index: int
    message: str


@dataclass(frozen=True)
class Run:
    """Content of an output folder.

    Attributes:
        flags: flags that differ from their defaults.
        finished: whether the run has ended and saved its model.
        unusable: excluded and skipped records.
        messages: warnings and errors in the log.
        log_end: last lines of the log.
        changed: time of the last change of a file.
        problems: damaged files and lines.
    """

    folder: Path
    steps: Steps
    validations: Sequence[ValidationRow]
    samples: Sequence[Sample]
    sessions: Sequence[Session]
    flags: Mapping[str, Any]
    finished: bool
    unusable: Sequence[UnusableRecord]
    messages: Sequence[LogMessage]
    log_end: Sequence[str]
    changed: datetime | None
    problems: Sequence[str]

    @property
    def last_step(self) -> int:
        """Number of steps done."""
        return int(self.steps.step[-1]) if len(self.steps) else 0

    @property
    def total_steps(self) -> int | None:
        """Planned number of steps; None if unknown."""
        return self.sessions[-1].total_steps if self.sessions else None

    def lowest_loss(self, part: str) -> str:
        """Describe the lowest validation loss and its step; `-` without validation."""
        steps, losses = self.validation_curve(part, "loss")
        if not np.isfinite(losses).any():
            return "-"
        best = int(np.nanargmin(losses))
        return f"{losses[best]:.3f} at step {steps[best]:,}"

    def validation_curve(self, part: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps and values of a validation metric of all records (`ALL`) or a dataset."""
        rows = [row for row in self.validations if part in row.scores]
        values = [row.scores[part][metric] for row in rows]
        return np.array([row.step for row in rows], np.int64), np.array(values, float)


def check_run_folders(folders: Sequence[Path]) -> None:
    """Check that each folder contains a run.

    Raises:
        UsageError: a folder does not; the message lists all problems.
    """
    problems = []
    for folder in folders:
        if not folder.is_dir():
            problems.append(f"{folder}: no such folder; pass the OUTPUT_DIR of a run")
        elif not any(is_file(folder / name) for name in _RUN_FILES):
            problems.append(
                f"{folder}: contains no run (no {CONFIG} or {METRICS}); pass the OUTPUT_DIR of a run"
            )
    if problems:
        raise UsageError(problems)


def read_run(folder: Path) -> Run:
    """Read the output folder of a run. Missing files count as empty; damaged lines are counted."""
    times, damaged = file_times(folder), dict[str, int]()
    steps, damaged[METRICS] = read_steps_file(folder / METRICS)
    validations, damaged[VALIDATION] = parse_lines(folder / VALIDATION, _validation)
    samples, damaged[SAMPLES] = parse_lines(folder / SAMPLES, _sample)
    sessions, damaged[SESSIONS] = parse_lines(folder / SESSIONS, _session)
    messages, log_end = read_log(folder / LOG)
    problems = [
        f"{name}: {counted(lines, 'damaged line')} ignored" for name, lines in damaged.items() if lines
    ]
    return Run(
        folder,
        steps,
        list({row.step: row for row in sorted(validations, key=lambda row: row.step)}.values()),
        list({(s.step, s.dataset, s.index): s for s in sorted(samples, key=lambda s: s.step)}.values()),
        sessions,
        _read_flags(folder / CONFIG, problems),
        is_file(folder / FINISHED),
        _read_unusable(folder / LEDGER),
        messages,
        log_end,
        datetime.fromtimestamp(max(times.values())).astimezone() if times else None,
        problems,
    )


def _read_flags(file: Path, problems: list[str]) -> dict[str, Any]:
    """Return the flags in `config.yaml`, if it exists. A damaged file is added to `problems`."""
    if not is_file(file):
        return {}
    try:
        flags = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, RecursionError):
        flags = None
    if isinstance(flags, dict):
        return {str(name): value for name, value in flags.items()}
    problems.append(f"{file.name}: damaged, ignored")
    return {}


def _read_unusable(ledger: Path) -> list[UnusableRecord]:
    # Other lines list trained records; there may be millions.
    rows, _ = parse_lines(ledger, _unusable, containing=b'"skipped"')
    return list(dict.fromkeys(record for records in rows for record in records))


def _unusable(row: Mapping[str, Any]) -> list[UnusableRecord]:
    return [
        UnusableRecord(count(row["step"]), str(r["dataset"]), count(r["index"]), str(r["message"]))
        for r in row["skipped"]
    ]


def file_times(folder: Path) -> dict[str, float]:
    """Return the modification time of each file of a run that the report reads."""
    files = (folder / name for name in (METRICS, VALIDATION, SAMPLES, SESSIONS, LOG, CONFIG, FINISHED))
    return {file.name: file.stat().st_mtime for file in files if is_file(file)}


def _validation(row: Mapping[str, Any]) -> ValidationRow:
    parts = {ALL: row, **row["sets"]}
    names = ("records", "loss", "em", "rougeL")
    scores = {part: {name: number(values.get(name)) for name in names} for part, values in parts.items()}
    return ValidationRow(count(row["step"]), scores)


def _sample(row: Mapping[str, Any]) -> Sample:
    return Sample(
        count(row["step"]),
        str(row["dataset"]),
        count(row["index"]),
        [Path(str(name)) for name in row["images"]],
        str(row["question"]),
        str(row["reference"]),
        str(row["answer"]),
        bool(row["truncated"]),
    )


def _session(row: Mapping[str, Any]) -> Session:
    tables = [[dict(entry) for entry in row[name]] for name in ("data", "validation_data")]
    if any(not isinstance(entry.get("dataset"), str) for table in tables for entry in table):
        raise ValueError("a dataset has no name")
    return Session(
        count(row["step"]),
        str(row["started"]),
        count(row["total_steps"]),
        str(row["description"]),
        count(row["parameters"]),
        count(row["trained_parameters"]),
        None if row["git"] is None else str(row["git"]),
        {str(name): str(version) for name, version in row["versions"].items()},
        dict(row["hardware"]),
        *tables,
    )
