"""Which records each optimizer step uses: a function of seed, epoch and step, not of the processes."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from internvl_chat.data.dataset import Draw

STRATEGIES = ("random", "sequential", "group_by_length")


def epoch_order(
    sizes: Sequence[int], *, seed: int, epoch: int, sequential: bool = False, resample: bool = False
) -> np.ndarray:
    """Return the order of an epoch's records.

    Args:
        sizes: records of each set; a record's number counts through all sets.
        seed: of the run.
        epoch: from 0.
        sequential: sets and records in the order of the files.
        resample: draw from each set in proportion to the square root of its size; the number of draws
            stays that of all records. A small set is gone through several times, a large one in part.

    Returns:
        (records,) int64.
    """
    total = sum(sizes)
    rng = np.random.default_rng([seed, epoch])
    if not resample:
        return np.arange(total) if sequential else rng.permutation(total)
    starts = np.cumsum([0, *sizes[:-1]])
    chosen = np.concatenate(
        [
            start + _cycle(rng, size, draws)
            for start, size, draws in zip(starts, sizes, resampled_sizes(sizes), strict=True)
        ]
    )
    return np.sort(chosen, kind="stable") if sequential else rng.permutation(chosen)


def resampled_sizes(sizes: Sequence[int]) -> list[int]:
    """Return how often each set is drawn from under square-root resampling; the sum stays the same.

    >>> resampled_sizes([900, 100])
    [750, 250]
    """
    total, roots = sum(sizes), np.sqrt(sizes)
    bounds = np.round(np.cumsum(roots) / roots.sum() * total).astype(int)
    return np.diff(bounds, prepend=0).tolist()


def _cycle(rng: np.random.Generator, size: int, draws: int) -> np.ndarray:
    """Draw from `range(size)` without repeating a number before all have come."""
    rounds = [rng.permutation(size) for _ in range(-(-draws // size))] if size else []
    return np.concatenate([*rounds, np.zeros(0, np.int64)])[:draws].astype(np.int64)


def deal(records: np.ndarray, processes: int, lengths: np.ndarray | None = None) -> list[np.ndarray]:
    """Deal a step's records to processes, as evenly in number as possible.

    Args:
        records: the step's records.
        processes: how many there are.
        lengths: tokens of each record; with them the processes also get about the same number of tokens,
            longest records first (LLaVA's length grouping).

    Returns:
        One array a process.
    """
    if lengths is None or processes == 1:
        return np.array_split(records, processes)
    capacity = [len(part) for part in np.array_split(records, processes)]
    shares: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for i in np.argsort(-lengths, kind="stable"):
        free = [p for p in range(processes) if len(shares[p]) < capacity[p]]
        lightest = min(free, key=lambda p: loads[p])
        shares[lightest].append(int(records[i]))
        loads[lightest] += int(lengths[i])
    return [np.array(share, np.int64) for share in shares]


class StepSampler(Sampler[list[Draw]]):
    """Yields, for each optimizer step of an epoch, the draws of one process.

    Every process sees the same number of steps, and in a step the same number of records: where an epoch's
    last, short step cannot be dealt evenly, a process gets one with weight zero, so that none waits.

    Args:
        sizes: records of each set.
        step_records: records of a step over all processes.
        rank: this process.
        processes: number of processes.
        seed: of the run.
        strategy: one of `STRATEGIES`.
        resample: square-root resampling of the sets.
        lengths: tokens of every record; given, the processes of a step get about the same number.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        step_records: int,
        rank: int = 0,
        processes: int = 1,
        seed: int = 0,
        strategy: str = "random",
        resample: bool = False,
        lengths: np.ndarray | None = None,
    ) -> None:
        self.sizes, self.step_records = list(sizes), step_records
        self.rank, self.processes = rank, processes
        self.seed, self.strategy, self.resample, self.lengths = seed, strategy, resample, lengths
        self.epoch = 0
        self._known: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-sum(self.sizes) // self.step_records)

    def _order(self, epoch: int) -> np.ndarray:
        return epoch_order(
            self.sizes,
            seed=self.seed,
            epoch=epoch,
            sequential=self.strategy == "sequential",
            resample=self.resample,
        )

    def step(self, epoch: int, number: int) -> np.ndarray:
        """Return the records of all processes in one step of an epoch, counted from 0."""
        if self._known[0] != epoch:
            self._known = (epoch, self._order(epoch))
        return self._known[1][number * self.step_records : (number + 1) * self.step_records]

    def __iter__(self) -> Iterator[list[Draw]]:
        for number in range(len(self)):
            step = self.step(self.epoch, number)
            lengths = self.lengths[step] if self.lengths is not None else None
            share = deal(step, self.processes, lengths)[self.rank]
            filler = -(-len(step) // self.processes) - len(share)
            yield [Draw(int(index), self.epoch) for index in share] + [
                Draw(int(step[0]), self.epoch, counts=False) for _ in range(filler)
            ]
