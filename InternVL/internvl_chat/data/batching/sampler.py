"""Which records each optimizer step uses: a function of seed, epoch and step, not of the processes."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from internvl_chat.data.batching.packing import StepPlanner
from internvl_chat.data.dataset import SampleIndex

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


class StepSampler(Sampler[list[list[SampleIndex]]]):
    """Yields, for each optimizer step of an epoch, the packs of one process.

    Every process sees the same number of steps, and in a step the same number of packs: where records are too
    few, a process gets a pack of one record with weight zero, so that none waits.

    Args:
        sizes: records of each set.
        step_records: records of a step over all processes.
        planner: spreads a step's records.
        rank: this process.
        seed: of the run.
        strategy: one of `STRATEGIES`.
        resample: square-root resampling of the sets.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        step_records: int,
        planner: StepPlanner,
        rank: int = 0,
        seed: int = 0,
        strategy: str = "random",
        resample: bool = False,
    ) -> None:
        self.sizes, self.step_records, self.planner, self.rank = list(sizes), step_records, planner, rank
        self.seed, self.strategy, self.resample = seed, strategy, resample
        self.epoch = self.skip = 0
        self._known: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose the epoch of the next iteration, and how many of its steps are done already."""
        self.epoch, self.skip = epoch, skip

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

    def position_of(self, step: int) -> tuple[int, int]:
        """Return the epoch, and the place in it, of a step counted from 1."""
        return divmod(step - 1, len(self))

    def packs(self, epoch: int, number: int) -> list[list[SampleIndex]]:
        """Return the packs of this process in one step of an epoch, counted from 0."""
        records = self.step(epoch, number)
        plan = self.planner(records)
        own = [[SampleIndex(int(index), epoch) for index in pack] for pack in plan[self.rank]]
        missing = max(len(packs) for packs in plan) - len(own)
        filler = [SampleIndex(self.planner.shortest(records), epoch, counts=False)]
        return own + [filler] * missing

    def __iter__(self) -> Iterator[list[list[SampleIndex]]]:
        epoch = self.epoch
        return (self.packs(epoch, number) for number in range(self.skip, len(self)))
