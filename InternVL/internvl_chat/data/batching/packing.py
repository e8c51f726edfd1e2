"""How the records of an optimizer step are spread over processes and forward passes.

A plan is a function of the step's records and their lengths alone, so that every process knows all of it
without asking the others. Nothing here changes what a step computes, only where and in how many pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# For each process its packs, for each pack the records in it.
StepPlan = list[list[np.ndarray]]


def deal(costs: np.ndarray, processes: int, *, equal_numbers: bool = False) -> list[np.ndarray]:
    """Deal records to processes so that each has about the same cost: dearest first, to the cheapest process.

    Args:
        costs: of each record, in any unit.
        processes: how many there are.
        equal_numbers: also the same number of records for each, but for the remainder.

    Returns:
        One array of positions in `costs` a process, in increasing order.

    >>> [share.tolist() for share in deal(np.array([9, 1, 1, 7]), 2)]
    [[0], [1, 2, 3]]
    """
    if processes == 1:
        return [np.arange(len(costs))]
    shares: list[list[int]] = [[] for _ in range(processes)]
    room = [len(part) for part in np.array_split(costs, processes)] if equal_numbers else None
    loads = np.zeros(processes)
    for i in np.argsort(-costs, kind="stable").tolist():
        free = [p for p in range(processes) if room is None or len(shares[p]) < room[p]]
        cheapest = min(free, key=lambda p: (loads[p], len(shares[p])))
        shares[cheapest].append(i)
        loads[cheapest] += costs[i]
    return [np.array(sorted(share), np.int64) for share in shares]


def cut(tokens: np.ndarray, max_tokens: int, least: int = 1) -> list[np.ndarray]:
    """Cut records into as few packs of at most `max_tokens` as longest-first placing finds, of like length.

    Args:
        tokens: of each record; one that is longer than a pack gets one for itself.
        max_tokens: of a pack.
        least: how many packs there should be, if there are records enough.

    Returns:
        One array of positions in `tokens` a pack, in increasing order.

    >>> [pack.tolist() for pack in cut(np.array([500, 300, 400, 200]), 700)]
    [[0, 3], [1, 2]]
    """
    if not len(tokens):
        return []
    number = max(-(-int(tokens.clip(max=max_tokens).sum()) // max_tokens), min(least, len(tokens)))
    longest_first = np.argsort(-tokens, kind="stable").tolist()
    lengths = tokens.tolist()
    while True:
        packs = _place(lengths, longest_first, max_tokens, min(number, len(lengths)))
        if packs is not None:
            return [np.array(sorted(pack), np.int64) for pack in packs]
        number += 1


def _place(lengths: list[int], order: list[int], max_tokens: int, number: int) -> list[list[int]] | None:
    """Put each record into the shortest of the packs, or return None if one does not fit."""
    packs: list[list[int]] = [[] for _ in range(number)]
    loads = [0] * number
    for i in order:
        shortest = loads.index(min(loads))
        if packs[shortest] and loads[shortest] + lengths[i] > max_tokens:
            return None
        packs[shortest].append(i)
        loads[shortest] += lengths[i]
    return packs


@dataclass(frozen=True)
class StepPlanner:
    """Plans the optimizer steps of a run.

    Attributes:
        processes: how many there are.
        tokens: of every record of an epoch.
        costs: of every record of an epoch, in any unit.
        max_packed_tokens: most tokens of a pack; None packs `records_per_pack` records of any length.
        records_per_pack: most records of a pack without `max_packed_tokens`.
    """

    processes: int
    tokens: np.ndarray
    costs: np.ndarray
    max_packed_tokens: int | None = None
    records_per_pack: int = 1

    def __call__(self, records: np.ndarray) -> StepPlan:
        """Plan one step; processes may get different numbers of packs only where records are too few.

        Args:
            records: numbers of the step's records in the epoch.
        """
        equal_numbers = self.max_packed_tokens is None
        shares = [records[s] for s in deal(self.costs[records], self.processes, equal_numbers=equal_numbers)]
        if equal_numbers:
            size = self.records_per_pack
            return [[share[i : i + size] for i in range(0, len(share), size)] for share in shares]
        cuts = [self._cut(share) for share in shares]
        most = max(map(len, cuts))
        return [
            [share[pack] for pack in (packs if len(packs) == most else self._cut(share, most))]
            for share, packs in zip(shares, cuts, strict=True)
        ]

    def _cut(self, share: np.ndarray, least: int = 1) -> list[np.ndarray]:
        return cut(self.tokens[share], self.max_packed_tokens, least)

    def shortest(self, records: Sequence[int] | np.ndarray) -> int:
        """Return the record that costs least to repeat."""
        records = np.asarray(records)
        return int(records[np.argmin(self.tokens[records])])
