"""Dataloader: options, worker processes, and iteration by optimizer step."""

import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch.utils.data import DataLoader

from internvl_chat.data.batching.collator import Pack, PackDataset
from internvl_chat.data.batching.sampler import StepSampler
from internvl_chat.data.record_set import RecordKey
from internvl_chat.utils import distributed
from internvl_chat.utils.errors import DataError, StorageError, TrainingError

# A worker forked while another thread holds CPython's HEAD lock deadlocks (before 3.11.10 and 3.12, see
# github.com/python/cpython/issues/112275). This call waits for the same lock, so deadlocks are rarer: under
# constant contention, 1 fork in 4,000 instead of 1 in 90.
os.register_at_fork(before=sys._current_frames)

# A pack, or the error that a dataloader worker returns instead; see `PackDataset`.
Result: TypeAlias = Pack | DataError | StorageError

WORKER_DIED = (
    "a dataloader worker died; the machine may be out of memory. Run the same command again to resume from "
    "the newest checkpoint"
)


@dataclass(frozen=True)
class DataLoaderOptions:
    """Dataloader options.

    Attributes:
        workers: number of worker processes, limited to the number of cores per rank; 0 to load in the
            training process.
        prefetch_factor: number of steps prefetched per worker; None for torch's default.
        pin_memory: copy packs to pinned memory, for GPU training.
    """

    workers: int = 0
    prefetch_factor: int | None = None
    pin_memory: bool = False

    def build(self, packs: PackDataset, sampler: StepSampler, *, persistent_workers: bool) -> DataLoader:
        """Return a rank's dataloader; each batch contains the packs of one step.

        Args:
            packs: dataset of packs.
            sampler: sampler of the rank.
            persistent_workers: keep the workers alive between epochs.
        """
        # More workers than cores would compete with each other.
        cores = max(1, (os.cpu_count() or 1) // distributed.local_world_size())
        workers = min(self.workers, cores)
        return DataLoader(
            packs,
            batch_sampler=sampler,
            collate_fn=list,
            num_workers=workers,
            pin_memory=self.pin_memory,
            persistent_workers=persistent_workers and workers > 0,
            prefetch_factor=self.prefetch_factor if workers else None,
            worker_init_fn=_init_worker,
            # Starting an epoch must not advance the generator that dropout uses.
            generator=torch.Generator(),
        )


def _init_worker(_: int) -> None:
    """Limit a worker to one thread and let it survive the first stop signal.

    A scheduler may signal every process of a job, but the training loop needs its workers until it has saved
    a checkpoint. A second SIGTERM ends the worker; `kill_workers` ends the remaining ones.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


def kill_workers() -> None:
    """Kill the remaining workers at exit.

    Python would send a single SIGTERM and then wait indefinitely for workers that ignore it.
    """
    # torch's handler would report this as a failure.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


class StepDataLoader:
    """Iterates over a rank's packs by optimizer step, across epochs."""

    def __init__(self, packs: PackDataset, sampler: StepSampler, options: DataLoaderOptions) -> None:
        self.packs, self.sampler = packs, sampler
        self.dataloader = options.build(packs, sampler, persistent_workers=True)

    def steps(self, first: int, last: int) -> Iterator[list[Pack]]:
        """Yield the packs of each step from `first` to `last` (1-based, inclusive).

        Raises:
            DataError: a record is unusable.
            StorageError: object storage is unavailable.
            TrainingError: a worker died, or the dataloader returned different records than planned.
        """
        step = first
        while step <= last:
            epoch, skip = self.sampler.position_of(step)
            self.sampler.set_epoch(epoch, skip)
            batches = iter(self.dataloader)
            while (results := self._next(batches)) is not None:
                packs = []
                for pack in results:
                    if isinstance(pack, DataError | StorageError):
                        raise pack
                    packs.append(pack)
                if count_records(packs) != self._planned(step):
                    raise TrainingError(
                        f"step {step}: the dataloader returned different records than planned"
                    )
                yield packs
                step += 1
                if step > last:
                    return

    def _next(self, batches: Iterator[list[Result]]) -> list[Result] | None:
        try:
            return next(batches, None)
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            # The worker's undelivered packs are lost.
            if not self.dataloader.num_workers:
                raise
            raise TrainingError(f"{WORKER_DIED} ({error!r})") from None

    def _planned(self, step: int) -> Counter[RecordKey]:
        """Count this rank's planned records of a step, without dummy samples."""
        indices = [i for pack in self.sampler.packs(*self.sampler.position_of(step)) for i in pack]
        return Counter(self.packs.data.key_of(i.index) for i in indices if i.counts)


def count_records(packs: Iterable[Pack]) -> Counter[RecordKey]:
    """Count the records in packs, including skipped records but not dummy samples."""
    records = Counter(
        key for pack in packs for key, counts in zip(pack.keys, pack.counts, strict=True) if counts
    )
    records.update(RecordKey(record.dataset, record.index) for pack in packs for record in pack.skipped)
    return records
