"""What a step was made of, and the two lines that tell of it: `metrics.jsonl` and `ledger.jsonl`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from internvl_chat.data.bad_records import Skipped
from internvl_chat.data.collator import Pack
from internvl_chat.data.record_set import RecordKey


class StepSums(NamedTuple):
    """What is added up over the packs of a step, and over all processes.

    Attributes:
        weight: of all supervised tokens in the loss.
        records: that count.
        tokens: of these.
        supervised_tokens: of these.
        tiles: of all records.
        flops: of forward and backward.
        skipped: records that turned out to be unusable.
        asked_to_stop: whether a process was.
    """

    weight: float
    records: int
    tokens: int
    supervised_tokens: int
    tiles: int
    flops: float
    skipped: int
    asked_to_stop: bool

    @classmethod
    def of_share(
        cls, packs: Sequence[Pack], weights: Sequence[torch.Tensor], flops: float, asked_to_stop: bool
    ) -> "StepSums":
        """Return the sums of one process.

        Args:
            packs: its share of the step.
            weights: (R,) of each pack, what a token of each record weighs.
            flops: of the share.
            asked_to_stop: whether this process was.
        """
        return cls(
            weight=sum(float((w * p.supervised).sum()) for w, p in zip(weights, packs, strict=True)),
            records=sum(int(p.counts.sum()) for p in packs),
            tokens=sum(p.num_tokens for p in packs),
            supervised_tokens=sum(p.num_supervised for p in packs),
            tiles=sum(len(p.tiles) for p in packs),
            flops=flops,
            skipped=sum(len(p.skipped) for p in packs),
            asked_to_stop=asked_to_stop,
        )

    def over_processes(self, add_up: Callable[[torch.Tensor], torch.Tensor]) -> "StepSums":
        """Return the sums of all processes, by what adds up float64 values over them."""
        values = add_up(torch.tensor(self, dtype=torch.float64)).tolist()
        return StepSums(*(type(own)(value) for own, value in zip(self, values, strict=True)))


@dataclass
class StepRecord:
    """What a step was made of, over all processes.

    Attributes:
        loss: of the whole step.
        learning_rate: that it used.
        sums: of its packs.
        skipped: records that turned out to be unusable.
        left_out: why the step changed no weight; None where it did.
    """

    loss: float
    learning_rate: float
    sums: StepSums
    skipped: tuple[Skipped, ...] = ()
    left_out: str | None = None


def figures_row(
    step: StepRecord,
    *,
    number: int,
    epoch: float,
    grad_norm: float | None,
    seconds: float,
    peak_flops: float | None,
    processes: int,
    max_memory: int,
) -> dict[str, Any]:
    """Return the step's line of `metrics.jsonl`.

    Args:
        step: what it was made of.
        number: of the step, from 1.
        epoch: how many have passed after it.
        grad_norm: before clipping.
        seconds: that the step took.
        peak_flops: FLOP/s of a device, None where it is not known.
        processes: of the run, each with a device.
        max_memory: bytes that this one used at most.
    """
    sums = step.sums
    row: dict[str, Any] = {
        "step": number,
        "epoch": round(epoch, 6),
        "loss": round(step.loss, 7),
        "grad_norm": None if grad_norm is None else round(grad_norm, 7),
        "learning_rate": step.learning_rate,
        "records": sums.records,
        "tokens": sums.tokens,
        "supervised_tokens": sums.supervised_tokens,
        "tiles": sums.tiles,
        "seconds": round(seconds, 4),
        "records_per_second": round(sums.records / seconds, 3),
        "tokens_per_second": round(sums.tokens / seconds, 1),
    }
    if peak_flops:
        row["mfu"] = round(sums.flops / seconds / peak_flops / processes, 4)
    row["max_memory_gb"] = round(max_memory / 1e9, 3)
    return row | _left_out(step)


def ledger_row(step: StepRecord, *, number: int, epoch: int, records: Sequence[RecordKey]) -> dict[str, Any]:
    """Return the step's line of `ledger.jsonl`.

    Args:
        step: what it was made of.
        number: of the step, from 1.
        epoch: that it belongs to, from 0.
        records: that were planned for it.
    """
    skipped = {(record.dataset, record.index) for record in step.skipped}
    trained = [record for record in records if record not in skipped]
    row = {"step": number, "epoch": epoch, **_left_out(step), "trained": trained}
    if skipped:
        row["skipped"] = [record._asdict() for record in step.skipped]
    return row


def _left_out(step: StepRecord) -> dict[str, str]:
    return {"left_out": step.left_out} if step.left_out else {}
