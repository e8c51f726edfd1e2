"""Balance the records of an optimizer step across ranks and bin-pack them into forward passes.

The plan depends only on the step's records and their lengths, so ranks compute it without communication. It
does not affect the result of the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The packs of each rank; each pack is an array of records.
StepPlan = list[list[np.ndarray]]


# Records are exchanged only if this lowers the busiest rank's cost by at least this fraction.
_MIN_IMPROVEMENT = 1e-3


def balance_records(costs: np.ndarray, world_size: int, *, equal_counts: bool = False) -> list[np.ndarray]:
    """Balance the total cost per rank.

    Assigns the most expensive records first, each to the cheapest rank. Then moves or swaps records between
    the busiest rank and another one while that lowers the higher of their two costs.

    Args:
        costs: cost of each record, in any unit.
        equal_counts: also give all ranks the same number of records; if they cannot be divided evenly, some
            ranks get one more.

    Returns:
        For each rank, the sorted positions of its records in `costs`.

    >>> [positions.tolist() for positions in balance_records(np.array([9, 1, 1, 7]), 2)]
    [[0], [1, 2, 3]]
    """
    if world_size == 1:
        return [np.arange(len(costs))]
    counts = [0] * world_size
    capacity = [len(part) for part in np.array_split(costs, world_size)] if equal_counts else None
    loads = np.zeros(world_size)
    rank_of = np.zeros(len(costs), np.int64)
    for i in np.argsort(-costs, kind="stable").tolist():
        ranks = [r for r in range(world_size) if capacity is None or counts[r] < capacity[r]]
        rank = min(ranks, key=lambda r: (loads[r], counts[r]))
        rank_of[i] = rank
        counts[rank] += 1
        loads[rank] += costs[i]
    if len(costs) > world_size:
        _exchange_records(rank_of, loads, costs, swaps_only=equal_counts)
    return [np.flatnonzero(rank_of == rank) for rank in range(world_size)]


def _exchange_records(rank_of: np.ndarray, loads: np.ndarray, costs: np.ndarray, *, swaps_only: bool) -> None:
    """Improve an assignment in place by moving or swapping records of the busiest rank.

    Args:
        rank_of: rank of each record.
        loads: total cost of each rank.
        costs: cost of each record.
        swaps_only: keep the number of records of each rank.
    """
    while True:
        busiest = int(loads.argmax())
        own = np.flatnonzero(rank_of == busiest)
        partners = np.flatnonzero(rank_of != busiest)
        given, partner_ranks = costs[partners], rank_of[partners]
        if not swaps_only:  # moving a record is a swap with an empty record
            given = np.append(given, np.zeros(len(loads)))
            partner_ranks = np.append(partner_ranks, np.arange(len(loads)))
        shifts = costs[own][:, None] - given
        highest = np.maximum(loads[busiest] - shifts, loads[partner_ranks] + shifts)
        highest[:, partner_ranks == busiest] = np.inf
        if highest.size == 0 or highest.min() >= (1 - _MIN_IMPROVEMENT) * loads[busiest]:
            return
        i, j = np.unravel_index(highest.argmin(), highest.shape)
        rank_of[own[i]] = partner_ranks[j]
        if j < len(partners):
            rank_of[partners[j]] = busiest
        loads[busiest] -= shifts[i, j]
        loads[partner_ranks[j]] += shifts[i, j]


def bin_pack(tokens: np.ndarray, max_tokens: int, min_packs: int = 1) -> list[np.ndarray]:
    """Bin-pack records into few packs of similar length: longest record first, into the shortest pack.

    Args:
        tokens: length of each record; a record longer than `max_tokens` gets a separate pack.
        max_tokens: maximum length of a pack.
        min_packs: minimum number of packs, if there are enough records.

    Returns:
        For each pack, the sorted positions of its records in `tokens`.

    >>> [pack.tolist() for pack in bin_pack(np.array([500, 300, 400, 200]), 700)]
    [[0, 3], [1, 2]]
    """
    if not len(tokens):
        return []
    num_packs = max(-(-int(tokens.clip(max=max_tokens).sum()) // max_tokens), min(min_packs, len(tokens)))
    longest_first = np.argsort(-tokens, kind="stable").tolist()
    lengths = tokens.tolist()
    while True:
        packs = _fill_packs(lengths, longest_first, max_tokens, min(num_packs, len(lengths)))
        if packs is not None:
            return [np.array(sorted(pack), np.int64) for pack in packs]
        num_packs += 1


def _fill_packs(lengths: list[int], order: list[int], max_tokens: int, num_packs: int) -> list | None:
    """Add each record to the shortest pack; return None if one does not fit."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    loads = [0] * num_packs
    for i in order:
        shortest = loads.index(min(loads))
        if packs[shortest] and loads[shortest] + lengths[i] > max_tokens:
            return None
        packs[shortest].append(i)
        loads[shortest] += lengths[i]
    return packs


@dataclass(frozen=True)
class StepPlanner:
    """Plans the forward passes of optimizer steps.

    Attributes:
        tokens: length of every record of an epoch.
        costs: cost of every record of an epoch, in any unit.
        max_packed_tokens: maximum length of a pack; None to pack a fixed number of records.
        records_per_pack: maximum number of records per pack if `max_packed_tokens` is None.
    """

    world_size: int
    tokens: np.ndarray
    costs: np.ndarray
    max_packed_tokens: int | None = None
    records_per_pack: int = 1

    def __call__(self, records: np.ndarray) -> StepPlan:
        """Return the packs of each rank for one step.

        All ranks get the same number of packs, unless there are too few records.

        Args:
            records: positions of the step's records in the epoch.
        """
        equal_counts = self.max_packed_tokens is None
        balanced = balance_records(self.costs[records], self.world_size, equal_counts=equal_counts)
        local_batches = [records[positions] for positions in balanced]
        if self.max_packed_tokens is None:
            size = self.records_per_pack
            return [[batch[i : i + size] for i in range(0, len(batch), size)] for batch in local_batches]
        packs = [self._pack(batch, self.max_packed_tokens) for batch in local_batches]
        most = max(map(len, packs))
        return [
            own if len(own) == most else self._pack(batch, self.max_packed_tokens, most)
            for batch, own in zip(local_batches, packs, strict=True)
        ]

    def load_imbalance(self, plan: StepPlan) -> float:
        """Return the cost of the most expensive rank of a plan, divided by the mean cost per rank."""
        costs = np.array([sum(self.costs[pack].sum() for pack in rank) for rank in plan])
        return float(costs.max() / costs.mean())

    def _pack(self, records: np.ndarray, max_tokens: int, min_packs: int = 1) -> list[np.ndarray]:
        packs = bin_pack(self.tokens[records], max_tokens, min_packs)
        return [records[positions] for positions in packs]

    def shortest(self, records: Sequence[int] | np.ndarray) -> int:
        """Return the shortest of the given records, the cheapest choice for a dummy sample."""
        records = np.asarray(records)
        return int(records[np.argmin(self.tokens[records])])
