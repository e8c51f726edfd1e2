"""Data for the loss plot: logged steps, smoothed curves and axis limits."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from internvl_chat.utils.files import read_json_lines

# Curves with fewer steps are not smoothed.
FEW_STEPS = 10
Row = dict[str, Any]


def read_steps(file: Path) -> list[Row]:
    """Return the rows of a JSON Lines log, sorted by step.

    If a step was repeated after a crash, only its last row is returned. Damaged lines are ignored.
    """
    rows = {row["step"]: row for row in read_json_lines(file) if row and isinstance(row.get("step"), int)}
    return [rows[step] for step in sorted(rows)]


class Curve(NamedTuple):
    """Losses by step; the loss of a skipped step is NaN.

    Attributes:
        steps: (N,) steps in ascending order.
        losses: (N,) loss of each step.
        records: (N,) number of records of each step, used as weights.
    """

    steps: np.ndarray
    losses: np.ndarray
    records: np.ndarray

    @classmethod
    def from_points(cls, points: Iterable[tuple[int, float | None, int]]) -> "Curve":
        """Build a curve from (step, loss, records) points."""
        columns = np.array([(s, np.nan if loss is None else loss, n) for s, loss, n in points], float)
        return cls(*columns.reshape(-1, 3).T)

    def mean(self, limits: tuple[float, float], *, factor: int = 1) -> np.ndarray:
        """Return the centered mean over `factor` * 5% of the steps, excluding losses outside the limits."""
        inside = np.where(is_inside(self.losses, limits), self.losses, np.nan)
        return centered_mean(inside, factor * self.half_width, self.records)

    @property
    def half_width(self) -> int:
        """Half width of the smoothing window, in steps; 0 if the curve is too short to be smoothed."""
        return max(1, len(self.steps) // 40) if len(self.steps) >= FEW_STEPS else 0


def centered_mean(values: np.ndarray, half_width: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the weighted mean in a window around each value, ignoring NaN; NaN if the window has no value.

    The window is shorter at the ends:
    - At the left end, where losses fall steeply, both halves shrink, the right half to at least an eighth.
    - At the right end, only the right half shrinks, because a mean of the last few values would be noisy.

    >>> centered_mean(np.array([9.0, 3.0, 6.0, 3.0]), 1).tolist()
    [9.0, 6.0, 4.0, 4.5]
    """
    position = np.arange(len(values))
    left = np.minimum(position, half_width)
    right = np.minimum(np.maximum(left, half_width // 8), position[::-1])
    weights = np.where(np.isfinite(values), 1.0 if weights is None else weights, 0.0)
    total, weight = (
        np.concatenate([[0.0], np.cumsum(x)]) for x in (np.where(weights > 0, values, 0.0) * weights, weights)
    )
    start, stop = position - left, position + right + 1
    with np.errstate(invalid="ignore"):
        return (total[stop] - total[start]) / (weight[stop] - weight[start])


def loss_limits(losses: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """Return the limits of a loss axis that shows all losses except spikes.

    The base range covers the five-step medians, the first loss, the 5th to 95th percentile and `others`. A
    loss is a spike if it is outside this range by more than half the width of the range. Without negative
    losses, the axis does not extend below 0.

    Args:
        losses: losses by step; may contain NaN.
        others: losses that must be visible in any case, such as validation losses.
    """
    losses, others = losses[np.isfinite(losses)], others[np.isfinite(others)]
    if not len(losses) + len(others):
        return 0.0, 1.0
    shown = [others]
    if len(losses):
        windows = np.lib.stride_tricks.sliding_window_view(losses, min(5, len(losses)))
        shown += [losses[:1], np.median(windows, axis=1), np.percentile(losses, [5, 95])]
    low, high = (function(np.concatenate(shown)) for function in (np.min, np.max))
    tolerance = (high - low) / 2
    inside = losses[is_inside(losses, (low - tolerance, high + tolerance))]
    low, high = min([low, *inside]), max([high, *inside])
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return float(max(low - margin, min(low, 0.0))), float(high + margin)


def is_inside(losses: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Return whether each loss is inside the limits; False for NaN."""
    return (losses >= limits[0]) & (losses <= limits[1])
