"""Metrics of a training step, and its rows in `metrics.jsonl` and `ledger.jsonl`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from internvl_chat.data.batching.collator import Pack
from internvl_chat.data.record_set import RecordKey
from internvl_chat.data.sources.skip_policy import SkippedRecord
from internvl_chat.model.flops import peak_flops
from internvl_chat.train.preflight.memory import max_memory
from internvl_chat.utils.distributed import all_reduce_sum, world_size


class StepSums(NamedTuple):
    """Sums over the packs of a step, on one rank or across all ranks.

    Attributes:
        weight: total loss weight of all supervised tokens.
        records: number of records, without dummy samples.
        flops: FLOPs of forward and backward passes.
        skipped: number of unusable records.
        stop_requested: number of ranks that received a stop signal.
        saving: number of ranks that are still writing a checkpoint.
    """

    weight: float
    records: int
    tokens: int
    supervised_tokens: int
    tiles: int
    flops: float
    skipped: int
    stop_requested: int
    saving: int

    @classmethod
    def from_packs(
        cls,
        packs: Sequence[Pack],
        weights: Sequence[Tensor],
        flops: float,
        *,
        stop_requested: bool,
        saving: bool,
    ) -> "StepSums":
        """Return the sums over this rank's packs.

        Args:
            weights: per pack, the loss weight of the tokens of each record: (R,).
            flops: FLOPs of these packs.
        """
        return cls(
            weight=sum(float((w * p.supervised).sum()) for w, p in zip(weights, packs, strict=True)),
            records=sum(int(p.counts.sum()) for p in packs),
            tokens=sum(p.num_tokens for p in packs),
            supervised_tokens=sum(p.num_supervised for p in packs),
            tiles=sum(len(p.tiles) for p in packs),
            flops=flops,
            skipped=sum(len(p.skipped) for p in packs),
            stop_requested=int(stop_requested),
            saving=int(saving),
        )

    def all_reduce(self) -> "StepSums":
        """Return the sums across all ranks. Collective: call on all ranks."""
        values = all_reduce_sum(torch.tensor(self, dtype=torch.float64), in_step=True).tolist()
        return StepSums._make(type(local)(value) for local, value in zip(self, values, strict=True))


class DatasetLoss(NamedTuple):
    """Loss of one dataset in a step.

    Attributes:
        records: number of records, without dummy samples.
        loss: weighted mean over the supervised tokens of these records, as in the loss of the step.
    """

    records: int
    loss: float


def dataset_sums(
    names: Sequence[str], packs: Sequence[Pack], weights: Sequence[Tensor], token_losses: Sequence[Tensor]
) -> Tensor:
    """Return this rank's number of records, loss weight and weighted loss per dataset: (3, D) float64.

    Args:
        names: names of the D datasets.
        packs: packs of this rank.
        weights: per pack, the loss weight of the tokens of each record: (R,).
        token_losses: per pack, the loss of each supervised token: (U,).
    """
    numbers = {name: number for number, name in enumerate(names)}
    # Dummy samples go to an extra column, which is dropped.
    columns = np.array(
        [
            numbers[key.dataset] if counts else len(names)
            for pack in packs
            for key, counts in zip(pack.keys, pack.counts.tolist(), strict=True)
        ]
    )
    supervised = torch.cat([pack.supervised for pack in packs]).numpy()
    weight = torch.cat(list(weights)).numpy()
    losses = torch.cat(list(token_losses)).double().cpu().numpy()
    sums = [
        np.bincount(columns, minlength=len(names) + 1),
        np.bincount(columns, weight * supervised, len(names) + 1),
        np.bincount(columns.repeat(supervised), losses * weight.repeat(supervised), len(names) + 1),
    ]
    return torch.from_numpy(np.stack(sums)[:, :-1].astype(np.float64))


def dataset_losses(names: Sequence[str], sums: Tensor) -> dict[str, DatasetLoss]:
    """Return the loss of each dataset that has supervised tokens in a step.

    Args:
        names: names of the D datasets.
        sums: (3, D) result of `dataset_sums`, summed across ranks.
    """
    columns = zip(names, *sums.tolist(), strict=True)
    return {
        name: DatasetLoss(int(records), loss / weight) for name, records, weight, loss in columns if weight
    }


@dataclass(frozen=True)
class StepRecord:
    """Result of a step across all ranks.

    Attributes:
        step: step number (1-based).
        epoch: number of epochs completed, including this step.
        grad_norm: gradient norm before clipping.
        sets: loss of each dataset with supervised tokens in the step.
        skipped: unusable records.
        skipped_because: reason for skipping the step; None if it was not skipped.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    sums: StepSums
    sets: Mapping[str, DatasetLoss] = field(default_factory=dict)
    skipped: Sequence[SkippedRecord] = ()
    skipped_because: str | None = None


def metrics_row(
    record: StepRecord,
    seconds: float,
    device: torch.device,
    *,
    pause: float = 0.0,
    load_imbalance: float | None = None,
) -> dict[str, Any]:
    """Return the row of a step in `metrics.jsonl`.

    A loss or gradient norm is None if it is not finite. The loss is also None without supervised tokens.

    Args:
        seconds: duration of the step.
        pause: seconds spent on validation, saving and waiting for rank 0 before the step.
        load_imbalance: FLOPs of the busiest rank, divided by the mean; None with one rank.
    """
    sums = record.sums
    loss = _rounded(record.loss) if sums.supervised_tokens else None
    row: dict[str, Any] = {
        "step": record.step,
        "epoch": round(record.epoch, 6),
        "loss": loss,
        "grad_norm": _rounded(record.grad_norm),
        "learning_rate": record.learning_rate,
        "records": sums.records,
        "tokens": sums.tokens,
        "supervised_tokens": sums.supervised_tokens,
        "tiles": sums.tiles,
        "seconds": round(seconds, 4),
        "pause_seconds": round(pause, 4),
        "records_per_second": round(sums.records / seconds, 3),
        "tokens_per_second": round(sums.tokens / seconds, 1),
    }
    if peak := peak_flops(device):
        row["mfu"] = round(sums.flops / seconds / peak / world_size(), 4)
    if load_imbalance is not None:
        row["load_imbalance"] = round(load_imbalance, 4)
    row["max_memory_gb"] = round(max_memory(device) / 1e9, 3)
    row["sets"] = {
        name: {"records": part.records, "loss": _rounded(part.loss)} for name, part in record.sets.items()
    }
    return row | _skipped_because(record)


def _rounded(value: float) -> float | None:
    """Round to seven decimals; return None for a non-finite value."""
    return round(value, 7) if math.isfinite(value) else None


def ledger_row(record: StepRecord, epoch: int, records: Sequence[RecordKey]) -> dict[str, Any]:
    """Return the row of a step in `ledger.jsonl`.

    Args:
        epoch: epoch of the step (0-based).
        records: all records planned for the step, including those skipped as unusable.
    """
    skipped = {(key.dataset, key.index) for key in record.skipped}
    trained = [key for key in records if key not in skipped]
    row = {"step": record.step, "epoch": epoch, **_skipped_because(record), "trained": trained}
    return row | ({"skipped": [item._asdict() for item in record.skipped]} if skipped else {})


def _skipped_because(record: StepRecord) -> dict[str, str]:
    return {"skipped_because": record.skipped_because} if record.skipped_because else {}


def skipped_records(ledger: Path) -> list[tuple[str, int]]:
    """Return the (dataset, index) of all records that `ledger.jsonl` lists as excluded or skipped."""
    lines = ledger.read_text(encoding="utf-8").splitlines() if ledger.is_file() else []
    rows = [json.loads(line) for line in lines if '"skipped"' in line]
    return [(record["dataset"], record["index"]) for row in rows for record in row.get("skipped", ())]
