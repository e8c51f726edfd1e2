"""Choose each step's records from the seed, epoch and step, independently of the number of ranks."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

from internvl_chat.data.batching.packing import StepPlanner
from internvl_chat.data.dataset import SampleIndex

# Number of cached plans: more than the steps that the dataloader's workers prepare ahead.
_CACHED_PLANS = 64


def epoch_order(
    sizes: Sequence[int], *, seed: int, epoch: int, sequential: bool = False, resample: bool = False
) -> np.ndarray:
    """Return the order of an epoch's records.

    Args:
        sizes: number of records of each dataset; records are numbered across all datasets.
        epoch: 0-based epoch.
        sequential: keep the order of the files.
        resample: sample each dataset in proportion to the square root of its size, keeping the total number
            of records. Small datasets are repeated and large ones subsampled.

    Returns:
        Record numbers in the order of training, int64.
    """
    total = sum(sizes)
    rng = np.random.default_rng([seed, epoch])
    if not resample:
        return np.arange(total) if sequential else rng.permutation(total)
    starts = np.cumsum([0, *sizes[:-1]])
    records = np.concatenate(
        [
            start + _sample(rng, size, count)
            for start, size, count in zip(starts, sizes, resampled_sizes(sizes), strict=True)
        ]
    )
    return np.sort(records, kind="stable") if sequential else rng.permutation(records)


def resampled_sizes(sizes: Sequence[int]) -> list[int]:
    """Return the number of samples per dataset under square-root resampling; the total is unchanged.

    >>> resampled_sizes([900, 100])
    [750, 250]
    """
    total, roots = sum(sizes), np.sqrt(sizes)
    bounds = np.round(np.cumsum(roots) / roots.sum() * total).astype(int)
    return np.diff(bounds, prepend=0).tolist()


def _sample(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    """Draw `count` numbers from `range(size)`; how often a number is drawn varies by at most one."""
    rounds = [rng.permutation(size) for _ in range(-(-count // size))] if size else []
    return np.concatenate([*rounds, np.zeros(0, np.int64)])[:count].astype(np.int64)


class StepSampler(Sampler[list[list[SampleIndex]]]):
    """Yields one rank's packs of each optimizer step of an epoch.

    All ranks get the same number of steps and the same number of packs per step. A rank with too few records
    gets dummy samples, which do not contribute to the loss.

    Args:
        sizes: number of records of each dataset.
        step_records: number of records per step across all ranks.
        planner: assigns the records of a step to ranks and packs.
        strategy: one of `SAMPLING_STRATEGIES`; `group_by_length` is the same as `random`.
        resample: resample the datasets by the square root of their sizes.
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
        self._cached_order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))
        # Each plan is needed twice: by the dataloader, ahead of the step, and by `load_imbalance` after it.
        self._plan = lru_cache(maxsize=_CACHED_PLANS)(lambda epoch, number: planner(self.step(epoch, number)))

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Set the epoch of the next iteration and the number of steps to skip."""
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        return -(-sum(self.sizes) // self.step_records)

    def _order(self, epoch: int) -> np.ndarray:
        if self._cached_order[0] != epoch:
            sequential = self.strategy == "sequential"
            order = epoch_order(
                self.sizes, seed=self.seed, epoch=epoch, sequential=sequential, resample=self.resample
            )
            self._cached_order = (epoch, order)
        return self._cached_order[1]

    def step(self, epoch: int, number: int) -> np.ndarray:
        """Return the records of all ranks for step `number` (0-based) of an epoch."""
        return self._order(epoch)[number * self.step_records : (number + 1) * self.step_records]

    def load_imbalance(self, step: int) -> float:
        """Return the cost of the most expensive rank in a 1-based step, divided by the mean cost per rank."""
        return self.planner.load_imbalance(self._plan(*self.position_of(step)))

    def position_of(self, step: int) -> tuple[int, int]:
        """Return the epoch of a 1-based step and the step's number within the epoch, both 0-based."""
        return divmod(step - 1, len(self))

    def packs(self, epoch: int, number: int) -> list[list[SampleIndex]]:
        """Return this rank's packs for step `number` (0-based) of an epoch.

        They are padded with dummy packs so that all ranks have the same number.
        """
        records = self.step(epoch, number)
        plan = self._plan(epoch, number)
        packs = [[SampleIndex(int(index), epoch) for index in pack] for pack in plan[self.rank]]
        missing = max(map(len, plan)) - len(packs)
        dummy_pack = [SampleIndex(self.planner.shortest(records), epoch, counts=False)]
        return packs + [dummy_pack] * missing

    def __iter__(self) -> Iterator[list[list[SampleIndex]]]:
        epoch = self.epoch
        return (self.packs(epoch, number) for number in range(self.skip, len(self)))
