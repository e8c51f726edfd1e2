"""Steps of a run, read from `metrics.jsonl` into one array per field."""

import math
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from internvl_chat.train.monitor.loss_curves import Curve, loss_limits
from internvl_chat.utils.files import read_json_lines

T = TypeVar("T")

FIELDS = ("epoch", "loss", "grad_norm", "learning_rate", "records", "tokens", "seconds", "pause_seconds",
          "records_per_second", "tokens_per_second", "mfu", "load_imbalance", "max_memory_gb")  # fmt: skip
_MAX_COUNT = 1 << 53
_MAX_NUMBER = 1e30


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


def count(value: Any) -> int:
    """Return a JSON value that must be a natural number, such as a step.

    Raises:
        ValueError: it is not a natural number, or unreasonably large.
    """
    if type(value) is not int or not 0 <= value < _MAX_COUNT:
        raise ValueError(f"not a natural number: {value}")
    return value


def number(value: Any) -> float:
    """Return a JSON number as a float; NaN for anything else and for numbers that charts cannot show."""
    return float(value) if type(value) in (int, float) and abs(value) < _MAX_NUMBER else math.nan


def read_steps_file(file: Path) -> tuple[Steps, int]:
    """Read `metrics.jsonl`; return the steps and the number of damaged lines.

    If a step was repeated after a crash, only its last row is used.
    """
    table = _Table()
    _, damaged = parse_lines(file, table.add)
    return table.steps(), damaged


class _Table:
    """Collects rows in flat arrays: millions of small objects would slow down Python's garbage collector."""

    def __init__(self) -> None:
        self.step, self.values = array("q"), array("d")
        self.sets: dict[str, array] = {}
        self.reasons: dict[int, str] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
        step, values = count(row["step"]), [number(row.get(name)) for name in FIELDS]
        sets = {name: (number(p["loss"]), float(p["records"])) for name, p in row.get("sets", {}).items()}
        position, reason = len(self.step), row.get("skipped_because")
        self.step.append(step)
        self.values.extend(values)
        for name, (loss, records) in sets.items():
            self.sets.setdefault(name, array("d")).extend((position, loss, records))
        if reason is not None:
            self.reasons[position] = str(reason)

    def steps(self) -> Steps:
        """Return the steps in ascending order, each with its last row."""
        step = np.array(self.step, np.int64)
        _, from_end = np.unique(step[::-1], return_index=True)
        kept = len(step) - 1 - from_end  # position of each step's last row
        order = np.full(len(step), -1)
        order[kept] = np.arange(len(kept))
        table = np.array(self.values).reshape(-1, len(FIELDS))[kept]
        skipped = {int(step[p]): reason for p, reason in self.reasons.items() if order[p] >= 0}
        sets = {}
        for name, column in sorted(self.sets.items()):
            points = np.array(column).reshape(-1, 3)
            rows = order[points[:, 0].astype(int)]
            points = points[rows >= 0][np.argsort(rows[rows >= 0])]
            steps = step[points[:, 0].astype(int)]
            losses = np.where(np.isin(steps, list(skipped)), np.nan, points[:, 1])
            sets[name] = Curve(steps, losses, points[:, 2])
        return Steps(step[kept], dict(zip(FIELDS, table.T, strict=True)), sets, skipped)
