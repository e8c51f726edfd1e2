"""Skipped steps, reported spikes, and the limit on bad steps."""

import math

import pytest

from internvl_chat.train.monitor.nan_guard import NanGuard, format_records
from internvl_chat.utils.errors import TrainingError

RECORDS = [("qa-bbox", 12), ("qa-puretext", 0)]


def check(guard, step, loss=1.0, norm=1.0, supervised=9):
    return guard.check(step, loss, norm, supervised, lambda: RECORDS)


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (math.nan, math.nan, "the loss is nan"),
        (math.inf, 1.0, "the loss is inf"),
        (1.0, math.inf, "the gradient norm is inf"),
        (1.0, math.nan, "the gradient norm is nan"),
    ],
)
def test_non_finite_step_is_skipped_and_its_records_logged(caplog, loss, norm, reason):
    assert check(NanGuard(1), 8, loss, norm) == reason
    named = f"step 8: {reason}; records (dataset and index): qa-bbox 12, qa-puretext 0. "
    assert f"{named}Step skipped (1 skipped so far, 1 allowed)" in caplog.text


def test_a_step_without_labels_is_skipped():
    assert check(NanGuard(1), 8, loss=0.0, norm=0.0, supervised=0) == "no supervised tokens"


def test_too_many_skipped_steps_end_the_run(caplog):
    guard = NanGuard(2)
    for step in (3, 9):
        assert check(guard, step, math.nan) and check(guard, step + 1) is None
    with pytest.raises(
        TrainingError, match=r"step 20: the loss is nan.*qa-bbox 12.*3 steps, more than --max_bad_steps 2"
    ):
        check(guard, 20, math.nan)


def test_no_bad_steps_allowed():
    with pytest.raises(TrainingError, match="1 step, more than --max_bad_steps 0"):
        check(NanGuard(0), 1, math.nan)


def test_spikes_are_reported_but_not_skipped(caplog):
    guard = NanGuard(0)
    for step in range(20):
        assert check(guard, step, norm=2.0) is None
    assert check(guard, 20, norm=20.0) is None and not caplog.records
    assert check(guard, 21, norm=20.1) is None
    assert "step 21: the gradient norm is 20.1, the median of the last 21 steps is 2; records" in caplog.text


def test_no_spikes_in_the_first_steps(caplog):
    guard = NanGuard(0)
    for step in range(10):
        check(guard, step, norm=10.0**step)
    assert not caplog.records


def test_many_records_are_counted():
    assert format_records([("a", i) for i in range(18)]).endswith("a 15 and 2 more")
    assert format_records([("a", 1)]) == "a 1"
