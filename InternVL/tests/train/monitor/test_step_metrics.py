"""A step's two lines, against what was written by hand."""

import pytest

from internvl_chat.data.bad_records import Skipped
from internvl_chat.data.record_set import RecordKey
from internvl_chat.train.monitor.step_metrics import StepRecord, StepSums, figures_row, ledger_row

SUMS = StepSums(
    weight=2.0,
    records=4,
    tokens=100,
    supervised_tokens=30,
    tiles=7,
    flops=6e12,
    skipped=0,
    asked_to_stop=False,
)


@pytest.fixture
def step():
    return StepRecord(loss=1.23456789, learning_rate=1e-5, sums=SUMS)


def figures(step, **changes) -> dict:
    return figures_row(step, **{
        "number": 3, "epoch": 0.5, "grad_norm": 0.25, "seconds": 2.0, "peak_flops": None, "processes": 2,
        "max_memory": 1_500_000_000,
    } | changes)  # fmt: skip


def test_figures(step):
    assert figures(step) == {
        "step": 3, "epoch": 0.5, "loss": 1.2345679, "grad_norm": 0.25, "learning_rate": 1e-5, "records": 4,
        "tokens": 100, "supervised_tokens": 30, "tiles": 7, "seconds": 2.0, "records_per_second": 2.0,
        "tokens_per_second": 50.0, "max_memory_gb": 1.5,
    }  # fmt: skip


def test_figures_where_the_peak_of_the_devices_is_known(step):
    assert figures(step, peak_flops=6e12)["mfu"] == 0.25


def test_the_ledger_names_what_was_trained_and_what_was_not(step):
    records = [RecordKey("a", 0), RecordKey("b", 5)]
    plain = ledger_row(step, number=3, epoch=0, records=records)
    assert plain == {"step": 3, "epoch": 0, "trained": [("a", 0), ("b", 5)]}
    step.skipped = (Skipped("b", 5, "r5", "is no image"),)
    assert ledger_row(step, number=3, epoch=0, records=records) == {
        "step": 3, "epoch": 0, "trained": [("a", 0)],
        "skipped": [{"dataset": "b", "index": 5, "id": "r5", "message": "is no image"}],
    }  # fmt: skip


def test_a_step_that_was_left_out_says_why_in_both(step):
    step.left_out = "the loss is nan"
    for row in (figures(step), ledger_row(step, number=3, epoch=0, records=[])):
        assert row["left_out"] == "the loss is nan"


def test_sums_of_two_processes_keep_their_types():
    asked = SUMS._replace(asked_to_stop=True)
    total = asked.over_processes(lambda values: 2 * values)
    assert total == StepSums(4.0, 8, 200, 60, 14, 12e12, 0, True)
    assert [type(value) for value in total] == [float, int, int, int, int, float, int, bool]
