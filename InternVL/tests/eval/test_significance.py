"""Paired significance tests of two models."""

from math import comb

import numpy as np
import pytest

from internvl_chat.eval.significance import RESAMPLES, compare_scores, holm


def test_mcnemar_is_the_exact_binomial_test_of_discordant_items():
    baseline = [1] * 30 + [0] * 9 + [1] * 2 + [0] * 20
    other = [1] * 30 + [1] * 9 + [0] * 2 + [0] * 20
    found = compare_scores(baseline, other)
    expected = 2 * sum(comb(11, k) for k in range(3)) / 2**11  # 9 gained, 2 lost
    assert (found.test, found.mean) == ("mcnemar", pytest.approx(7 / 61))
    assert found.p_value == pytest.approx(expected)


def test_bootstrap_interval_matches_the_normal_approximation():
    rng = np.random.default_rng(1)
    baseline = rng.uniform(0.2, 0.6, 400)
    other = baseline + rng.normal(0.03, 0.2, 400)
    found = compare_scores(baseline, other)
    error = np.std(other - baseline) / 20
    assert found.test == "bootstrap" and found.mean == pytest.approx(np.mean(other - baseline))
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.15 * error)
    assert (found.low > 0) == (found.p_value < 0.05)
    assert compare_scores(baseline, other) == found  # the seed is fixed
    assert compare_scores(other, baseline).mean == -found.mean


def test_clear_difference_has_the_smallest_p_value():
    found = compare_scores(np.linspace(0, 0.5, 50), np.linspace(0.3, 0.9, 50))
    assert found.p_value == pytest.approx(2 / (RESAMPLES + 1)) and found.low > 0.3


def test_equal_scores():
    for scores in ([0.0, 1.0, 1.0], [0.2, 0.7, 0.4]):
        found = compare_scores(scores, scores)
        assert (found.mean, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_one_item_has_no_interval():
    found = compare_scores([0.2], [0.7])
    assert (found.low, found.high, found.p_value) == (None, None, 1)
    assert compare_scores([0], [1]).p_value == 1


def test_holm():
    """Example with the corrected values computed by hand."""
    assert holm([0.01, 0.02, 0.03, 0.005]) == pytest.approx([0.03, 0.04, 0.04, 0.02])
    assert holm([0.6, 0.9]) == [1, 1] and holm([]) == []
