"""Predict the duration of an optimizer step from its FLOPs, memory traffic and communication."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from internvl_chat.data.batching.packing import StepPlanner
from internvl_chat.data.batching.sampler import StepSampler
from internvl_chat.data.index.cache import Lengths
from internvl_chat.model.flops import FlopCounter
from internvl_chat.train.planning.hardware import Hardware
from internvl_chat.train.planning.modes import Mode

# Memory traffic per trained weight in an optimizer step, in bytes, including gradient clipping: reads and
# writes of weight, gradient, moments and master weight. See benchmarks/README.md for the bf16 updates.
_FLOAT32_STEP = 36
_BF16_STEP = {"master": 46, "stochastic": 88, "bf16": 22}
_COMPILED_STEP = {"master": 34, "stochastic": 28, "bf16": 22}
# Steps that are simulated to find the load of the busiest rank.
_SIMULATED_STEPS = 200
# Above this number of (record, rank) pairs per step, the load is estimated from the distribution of costs.
MAX_PAIRS = 4096


class Load(NamedTuple):
    """Work of the busiest rank in a step, as a mean over steps.

    Attributes:
        flops: FLOPs of the passes, including recomputed activations.
        packs: number of packs.
        balance: FLOPs of the busiest rank, divided by the mean of all ranks.
    """

    flops: float
    packs: float
    balance: float


class Work(NamedTuple):
    """Work and communication of the busiest rank in a step, as a mean over steps.

    Attributes:
        flops: FLOPs of the passes, including recomputed activations.
        packs: number of packs.
        updated: memory traffic of the optimizer step in bytes.
        sent: bytes sent in collectives across all ranks.
        sent_within: bytes sent in collectives within a node.
        sent_between: bytes sent in collectives between nodes, with one rank of each node.
    """

    flops: float
    packs: float
    updated: float
    sent: float
    sent_within: float = 0.0
    sent_between: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """Duration of a step in seconds, by cause.

    Attributes:
        compute: forward and backward passes.
        optimizer: weight update and gradient clipping.
        communication: collective operations that do not overlap with computation.
        overhead: fixed time per step and pack.
    """

    compute: float
    optimizer: float
    communication: float
    overhead: float

    @property
    def total(self) -> float:
        """Duration of the step."""
        return self.compute + self.optimizer + self.communication + self.overhead

    @property
    def limit(self) -> str:
        """The cause that takes the most time."""
        return max(vars(self), key=lambda name: vars(self)[name])


def busiest_rank(sampler: StepSampler, lengths: Lengths, counter: FlopCounter, checkpointed: float) -> Load:
    """Return the mean load of the busiest rank over evenly spaced steps of the first epoch.

    Args:
        sampler: records of each step.
        lengths: lengths of the records.
        counter: FLOPs of the model.
        checkpointed: fraction of the decoder layers with activation checkpointing.
    """
    costs = record_flops(lengths, counter, checkpointed)
    planner, records = sampler.planner, sampler.step_records
    if records * planner.world_size > MAX_PAIRS:
        mean = float(costs.mean()) * records / planner.world_size
        # The busiest rank has at least the most expensive record of the step.
        longest = float(np.quantile(costs, 1 - 1 / (records + 1)))
        return Load(max(mean, longest), _least_packs(planner, records, lengths), max(mean, longest) / mean)
    loads, packs, means = [], [], []
    full_steps = max(1, sum(sampler.sizes) // records)  # the last step may have fewer records
    for step in np.unique(np.linspace(0, full_steps - 1, _SIMULATED_STEPS).astype(int)):
        records_of_step = sampler.step(0, int(step))
        plan = planner(records_of_step)
        loads.append(max(sum(costs[pack].sum() for pack in rank) for rank in plan))
        packs.append(max(map(len, plan)))
        means.append(costs[records_of_step].sum() / planner.world_size)
    return Load(float(np.mean(loads)), float(np.mean(packs)), float(np.mean(loads) / np.mean(means)))


def record_flops(lengths: Lengths, counter: FlopCounter, checkpointed: float) -> np.ndarray:
    """Return the FLOPs of each record, including recomputed activations."""
    tokens = lengths.tokens.astype(np.float64)
    recomputed = counter.decoder * tokens + counter.attention * tokens * (tokens + 1) / 2
    return counter.records(lengths.tokens, lengths.supervised, lengths.tiles) + checkpointed * recomputed


def _least_packs(planner: StepPlanner, records: int, lengths: Lengths) -> float:
    """Return a lower bound for the packs per rank: `records` records, divided evenly and packed perfectly."""
    per_rank = records / planner.world_size
    if planner.max_packed_tokens is None:
        return math.ceil(per_rank / planner.records_per_pack)
    return max(1.0, per_rank * float(lengths.tokens.mean()) / planner.max_packed_tokens)


def optimizer_bytes(numel: Mapping[str, int], precision: str, *, compiled: bool) -> float:
    """Return the memory traffic of an unsharded optimizer step in bytes.

    Args:
        numel: number of trained weights by dtype: `float32` and `bfloat16`.
        precision: value of `--weight_precision`.
        compiled: whether the update of bf16 weights is compiled.
    """
    table = _COMPILED_STEP if compiled else _BF16_STEP
    return numel["float32"] * _FLOAT32_STEP + numel["bfloat16"] * table[precision]


def sent_bytes(
    mode: Mode, ranks: int, nodes: int, weights: float, trained: float, packs: float
) -> dict[str, float]:
    """Return the bytes that a rank sends in a step, keyed by the field of `Work`.

    Args:
        mode: parallel mode.
        ranks: number of ranks.
        nodes: number of nodes.
        weights: bytes of all weights.
        trained: bytes of the trained weights.
        packs: packs per step and rank.
    """
    total = mode.gathers * packs * weights + mode.reduces * trained
    if mode.parallel != "hsdp":
        return {"sent": (ranks - 1) / ranks * total}
    local = ranks // nodes
    # The shards of the gradients are then all-reduced across nodes.
    between = 2 * (nodes - 1) / nodes * trained / local
    return {"sent": 0.0, "sent_within": (local - 1) / local * total, "sent_between": between}


def step_time(hardware: Hardware, work: Work, *, ranks: int, nodes: int) -> StepTime:
    """Return the duration of a step.

    Between nodes, NCCL spreads a collective operation over the network adapters of all GPUs of a node.

    Args:
        hardware: device and connections of a rank.
        work: work of the busiest rank.
        ranks: number of ranks.
        nodes: number of nodes.
    """
    achieved = hardware.efficiency
    compute = work.flops / (achieved.compute * hardware.flops)
    link = hardware.link if nodes == 1 else min(hardware.link, hardware.network * ranks / nodes)
    seconds = work.sent / link + work.sent_within / hardware.link + work.sent_between / hardware.network
    communication = seconds / achieved.link
    return StepTime(
        compute=compute,
        optimizer=work.updated / (achieved.memory * hardware.bandwidth),
        communication=max(0.0, communication - achieved.overlap * compute),
        overhead=achieved.step_seconds + achieved.pack_seconds * work.packs,
    )
