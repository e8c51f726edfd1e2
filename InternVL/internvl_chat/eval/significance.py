"""Paired significance tests for the scores of two models on the same items."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, bootstrap

RESAMPLES = 9999
SEED = 0
CONFIDENCE = 0.95
# Resamples computed together, which bounds the memory for large benchmarks.
_BATCH = 500


@dataclass(frozen=True)
class Difference:
    """Mean difference of two models.

    Attributes:
        mean: mean of `other - baseline`.
        low: lower end of the 95% confidence interval (percentile bootstrap); None with a single item.
        high: upper end of the interval.
        p_value: two-sided p-value of `test`.
        test: `mcnemar` (exact, for scores of 0 and 1) or `bootstrap`.
    """

    mean: float
    low: float | None
    high: float | None
    p_value: float
    test: str


def compare_scores(baseline: Sequence[float], other: Sequence[float]) -> Difference:
    """Compare the scores of two models on the same items, in the same order.

    The bootstrap resamples items with a fixed seed.
    """
    first, second = np.asarray(baseline, float), np.asarray(other, float)
    differences = second - first
    mean = float(differences.mean())
    low, high, resampled = None, None, np.zeros(0)
    if len(differences) > 1:
        result = bootstrap(
            (differences,), np.mean, n_resamples=RESAMPLES, batch=_BATCH, confidence_level=CONFIDENCE,
            method="percentile", rng=np.random.default_rng(SEED),
        )  # fmt: skip
        low, high = map(float, result.confidence_interval)
        resampled = result.bootstrap_distribution
    if np.isin((first, second), (0, 1)).all():
        gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
        p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
        return Difference(mean, low, high, p_value, "mcnemar")
    return Difference(mean, low, high, _bootstrap_p_value(resampled), "bootstrap")


def _bootstrap_p_value(resampled: np.ndarray) -> float:
    """Return twice the fraction of resampled means on the rarer side of 0 (add-one smoothed), at most 1."""
    if not len(resampled):
        return 1.0
    fewer = min(int((resampled <= 0).sum()), int((resampled >= 0).sum()))
    return min(1.0, 2 * (fewer + 1) / (len(resampled) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for multiple comparisons by the method of Holm (1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
