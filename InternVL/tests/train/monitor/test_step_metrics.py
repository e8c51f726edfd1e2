"""Metrics of a step and its rows in the logs."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from internvl_chat.data.record_set import RecordKey
from internvl_chat.data.sources.skip_policy import SkippedRecord
from internvl_chat.train.monitor import step_metrics
from internvl_chat.train.monitor.step_metrics import (
    DatasetLoss,
    StepRecord,
    StepSums,
    dataset_losses,
    dataset_sums,
    ledger_row,
    metrics_row,
    skipped_records,
)

SUMS = StepSums(
    weight=2.0,
    records=4,
    tokens=100,
    supervised_tokens=30,
    tiles=7,
    flops=6e12,
    skipped=0,
    stop_requested=0,
    saving=0,
)


def record(**changes):
    values = {
        "step": 3,
        "epoch": 0.5,
        "loss": 1.23456789,
        "learning_rate": 1e-5,
        "grad_norm": 0.25,
        "sums": SUMS,
    }
    return StepRecord(**values | {"sets": {"a": DatasetLoss(4, 1.23456789)}} | changes)


@pytest.fixture
def metrics(monkeypatch):
    """Return the row of a 2 s step on two ranks with a peak memory of 1.5 GB."""
    monkeypatch.setattr(step_metrics, "max_memory", lambda _: 1_500_000_000)
    monkeypatch.setattr(step_metrics, "world_size", lambda: 2)
    return lambda step: metrics_row(step, 2.0, torch.device("cpu"))


def test_metrics(metrics):
    assert metrics(record()) == {
        "step": 3, "epoch": 0.5, "loss": 1.2345679, "grad_norm": 0.25, "learning_rate": 1e-5, "records": 4,
        "tokens": 100, "supervised_tokens": 30, "tiles": 7, "seconds": 2.0, "pause_seconds": 0.0,
        "records_per_second": 2.0,
        "tokens_per_second": 50.0, "max_memory_gb": 1.5, "sets": {"a": {"records": 4, "loss": 1.2345679}},
    }  # fmt: skip


def test_load_imbalance():
    assert metrics_row(record(), 2.0, torch.device("cpu"), load_imbalance=1.23456)["load_imbalance"] == 1.2346


@pytest.mark.parametrize(
    ("changes", "loss", "norm"),
    [
        ({"loss": math.nan, "grad_norm": math.inf}, None, None),
        ({"grad_norm": math.nan}, 1.2345679, None),
        ({"loss": 0.0, "grad_norm": 0.0, "sums": SUMS._replace(supervised_tokens=0)}, None, 0.0),
    ],
)
def test_non_finite_values_are_null(metrics, changes, loss, norm):
    row = metrics(record(**changes, skipped_because="a reason"))
    assert (row["loss"], row["grad_norm"]) == (loss, norm)
    json.dumps(row, allow_nan=False)


def test_mfu_needs_peak_flops(metrics, monkeypatch):
    monkeypatch.setattr(step_metrics, "peak_flops", lambda _: 6e12)
    assert metrics(record())["mfu"] == 0.25


def test_ledger_lists_trained_and_skipped_records():
    records = [RecordKey("a", 0), RecordKey("b", 5)]
    plain = ledger_row(record(), 0, records)
    assert plain == {"step": 3, "epoch": 0, "trained": [("a", 0), ("b", 5)]}
    skipped = (SkippedRecord("b", 5, "r5", "is not an image"),)
    assert ledger_row(record(skipped=skipped), 0, records) == {
        "step": 3, "epoch": 0, "trained": [("a", 0)],
        "skipped": [{"dataset": "b", "index": 5, "id": "r5", "message": "is not an image"}],
    }  # fmt: skip


def test_both_rows_contain_the_reason_for_a_skipped_step(metrics):
    skipped = record(skipped_because="the loss is nan")
    for row in (metrics(skipped), ledger_row(skipped, 0, [])):
        assert row["skipped_because"] == "the loss is nan"


def test_sums_from_packs():
    def pack(supervised, counts, tokens, tiles, skipped):
        supervised = torch.tensor(supervised)
        return SimpleNamespace(
            supervised=supervised, counts=torch.tensor(counts), num_tokens=tokens, tiles=[None] * tiles,
            num_supervised=int(supervised.sum()), skipped=[None] * skipped,
        )  # fmt: skip

    packs = [pack([3, 5], [1, 1], 20, 2, 0), pack([4], [0], 9, 1, 2)]
    weights = [torch.tensor([0.5, 2.0]), torch.tensor([0.0])]
    sums = StepSums.from_packs(packs, weights, 6e9, stop_requested=True, saving=False)
    assert sums == StepSums(11.5, 2, 29, 12, 3, 6e9, 2, 1, 0)


def losses_pack(*records):
    """Return a pack, the loss weights of its records and its token losses."""
    keys, counts, weights, losses = zip(*records, strict=True)
    pack = SimpleNamespace(
        keys=keys, counts=torch.tensor(counts), supervised=torch.tensor([len(each) for each in losses])
    )
    flat = [loss for each in losses for loss in each]
    return pack, torch.tensor(weights, dtype=torch.float64), torch.tensor(flat)


def test_losses_of_datasets():
    first = losses_pack(
        (RecordKey("b", 0), True, 0.5, [1.0, 3.0]), (RecordKey("a", 7), True, 1.0, [4.0]),
    )  # fmt: skip
    second = losses_pack(
        (RecordKey("", -1), False, 0.0, [float("nan")]), (RecordKey("b", 2), True, 0.25, [8.0] * 4),
    )  # fmt: skip
    sums = dataset_sums(["a", "b", "unused"], *zip(first, second, strict=True))
    assert sums.tolist() == [[1, 2, 0], [1, 2, 0], [4, 10, 0]]
    assert dataset_losses(["a", "b", "unused"], sums) == {"a": DatasetLoss(1, 4.0), "b": DatasetLoss(2, 5.0)}


def test_losses_of_datasets_without_records():
    sums = dataset_sums(["a"], *zip(losses_pack((RecordKey("", -1), False, 0.0, [])), strict=True))
    assert dataset_losses(["a"], sums) == {}


def test_sums_across_ranks_keep_their_types(monkeypatch):
    monkeypatch.setattr(step_metrics, "all_reduce_sum", lambda values, in_step: 2 * values)
    total = SUMS._replace(stop_requested=1, saving=1).all_reduce()
    assert total == StepSums(4.0, 8, 200, 60, 14, 12e12, 0, 2, 2)
    assert [type(value) for value in total] == [float, int, int, int, int, float, int, int, int]


def test_skipped_records_are_read_from_the_ledger(tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    assert skipped_records(ledger) == []
    lines = [
        {"step": 0, "skipped": [{"dataset": "a", "index": 3, "message": "no such file"}], "trained": []},
        ledger_row(record(skipped=(SkippedRecord("b", 1, None, "x"),)), 0, [RecordKey("a", 0)]),
        ledger_row(record(skipped_because="the loss is nan"), 0, [RecordKey("a", 1)]),
    ]
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert skipped_records(ledger) == [("a", 3), ("b", 1)]
