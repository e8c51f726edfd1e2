"""Which steps are left out, which are only remarked on, and when it is enough."""

import math

import pytest

from internvl_chat.train.monitor.nan_guard import StepGuard, name_records
from internvl_chat.utils.errors import TrainingError

RECORDS = [("qa-bbox", 12), ("qa-puretext", 0)]


def judge(guard, step, loss=1.0, norm=1.0, supervised=9):
    return guard.judge(step, loss, norm, supervised, lambda: RECORDS)


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (math.nan, math.nan, "the loss is nan"),
        (math.inf, 1.0, "the loss is inf"),
        (1.0, math.inf, "the gradient's norm is inf"),
        (1.0, math.nan, "the gradient's norm is nan"),
    ],
)
def test_a_step_that_is_no_number_is_left_out_and_named(caplog, loss, norm, reason):
    assert judge(StepGuard(1), 8, loss, norm) == reason
    assert (
        f"step 8: {reason}; its records (data set and index from 0): qa-bbox 12, qa-puretext 0. "
        in caplog.text
    )
    assert "left out (1 of 1)" in caplog.text


def test_a_step_that_teaches_nothing_is_left_out():
    assert judge(StepGuard(1), 8, loss=0.0, norm=0.0, supervised=0) == "nothing in it is supervised"


def test_too_many_end_the_run(caplog):
    guard = StepGuard(2)
    for step in (3, 9):
        assert judge(guard, step, math.nan) and judge(guard, step + 1) is None
    with pytest.raises(TrainingError, match=r"step 20: the loss is nan.*qa-bbox 12.*3 bad steps.*is 2"):
        judge(guard, 20, math.nan)


def test_none_may_be_bad():
    with pytest.raises(TrainingError, match="--max_bad_steps is 0"):
        judge(StepGuard(0), 1, math.nan)


def test_spikes_are_remarked_on_and_used(caplog):
    guard = StepGuard(0)
    for step in range(20):
        assert judge(guard, step, norm=2.0) is None
    assert judge(guard, 20, norm=20.0) is None and not caplog.records
    assert judge(guard, 21, norm=20.1) is None
    assert "step 21: the gradient's norm is 20.1, and 2 in the median of the last 21 steps" in caplog.text


def test_the_first_steps_are_no_spikes(caplog):
    guard = StepGuard(0)
    for step in range(10):
        judge(guard, step, norm=10.0**step)
    assert not caplog.records


def test_many_records_are_counted():
    assert name_records([("a", i) for i in range(18)]).endswith("a 15 and 2 more")
    assert name_records([("a", 1)]) == "a 1"
