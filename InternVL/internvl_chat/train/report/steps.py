"""Steps of a run, read from `metrics.jsonl` into one array per field."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from internvl_chat.train.monitor.loss_curves import Curve, loss_limits
from internvl_chat.utils.files import read_json_lines

T = TypeVar("T")

FIELDS = ("epoch", "loss", "grad_norm", "learning_rate", "records", "tokens", "seconds", "pause_seconds",
          "records_per_second", "tokens_per_second", "mfu", "max_memory_gb")  # fmt: skip
_MAX_STEP = 1 << 53


@dataclass(frozen=True)
class Steps:
    """The S steps of a run, in ascending order.

    Attributes:
        step: (S,) int64.
        columns: (S,) float64 per name in `FIELDS`; NaN where the log has no number.
        sets: loss curve of each dataset.
        skipped: step -> reason for skipping it.
    """

    step: np.ndarray
    columns: Mapping[str, np.ndarray]
    sets: Mapping[str, Curve]
    skipped: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a column."""
        return self.columns[name]

    @property
    def loss(self) -> Curve:
        """Loss of each step; NaN where the step was skipped."""
        return self.curve("loss", np.nan_to_num(self["records"], nan=1.0))

    def curve(self, name: str, weights: np.ndarray | None = None) -> Curve:
        """Return a column as a curve; NaN where the step was skipped."""
        values = self[name].copy()
        values[np.isin(self.step, list(self.skipped))] = np.nan
        return Curve(self.step, values, np.ones(len(self)) if weights is None else weights)


def mean_ends(curve: Curve) -> tuple[float, float]:
    """Return the first and the last value of the smoothed curve; NaN without values."""
    mean = curve.mean(loss_limits(curve.losses, np.zeros(0)))
    known = mean[np.isfinite(mean)]
    return (float(known[0]), float(known[-1])) if len(known) else (math.nan, math.nan)


def parse_lines(file: Path, parse: Callable[[Any], T], *, containing: bytes = b"") -> tuple[list[T], int]:
    """Parse the lines of a JSON Lines file; return the results and the number of damaged lines.

    A line is damaged if it is not a JSON object, or if `parse` finds a field missing or of the wrong type.

    Args:
        file: the file; a missing file has no lines.
        parse: parses the object on a line.
        containing: ignore lines without these bytes.
    """
    parsed, damaged = [], 0
    for row in read_json_lines(file, containing=containing):
        try:
            parsed.append(parse(row))
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
            damaged += 1
    return parsed, damaged


def step_of(row: Mapping[str, Any]) -> int:
    """Return the step of a row.

    Raises:
        ValueError: the step is not a natural number.
    """
    step = row["step"]
    if type(step) is not int or not 0 <= step < _MAX_STEP:
        raise ValueError(f"not a step: {step}")
    return step


def number(value: Any) -> float:
    """Return a finite JSON number as a float, and NaN for anything else."""
    return float(value) if type(value) in (int, float) and math.isfinite(value) else math.nan


def read_steps_file(file: Path) -> tuple[Steps, int]:
    """Read `metrics.jsonl`; return the steps and the number of damaged lines.

    If a step was repeated after a crash, only its last row is used.
    """
    rows, damaged = parse_lines(file, _parse)
    parts: dict[str, list[tuple[int, float, float]]] = {}
    skipped: dict[int, str] = {}
    last = {step: position for position, (step, *_) in enumerate(rows)}
    kept = [rows[last[step]] for step in sorted(last)]
    for step, _, sets, reason in kept:
        if reason is not None:
            skipped[step] = reason
        for name, loss, records in sets:
            parts.setdefault(name, []).append((step, np.nan if reason else loss, records))
    table = np.array([values for _, values, *_ in kept], float).reshape(-1, len(FIELDS))
    steps = Steps(
        np.array([step for step, *_ in kept], np.int64),
        dict(zip(FIELDS, table.T, strict=True)),
        {name: Curve(*np.array(points).T) for name, points in sorted(parts.items())},
        skipped,
    )
    return steps, damaged


def _parse(row: Mapping[str, Any]) -> tuple[int, list[float], Sequence[tuple[str, float, float]], str | None]:
    """Return the step, values, (dataset, loss, records) and reason for skipping of a row."""
    sets = [
        (name, number(part["loss"]), float(part["records"])) for name, part in row.get("sets", {}).items()
    ]
    reason = row.get("skipped_because")
    return step_of(row), [number(row.get(name)) for name in FIELDS], sets, reason and str(reason)
