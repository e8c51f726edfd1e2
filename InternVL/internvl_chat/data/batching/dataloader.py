"""The dataloader: its worker processes, and what happens when one of them dies."""

import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from internvl_chat.data.batching.collator import Pack, PackDataset
from internvl_chat.data.batching.sampler import StepSampler
from internvl_chat.data.record_set import RecordKey
from internvl_chat.utils import distributed
from internvl_chat.utils.errors import DataError, TrainingError

# A worker that is forked while a thread of torch enters Python waits for that thread's lock for ever (CPython
# before 3.11.10 and 3.12, see github.com/python/cpython/issues/112275). This call takes the same lock and
# so waits until it is free: under constant contention 1 fork in 4,000 hangs instead of 1 in 90.
os.register_at_fork(before=sys._current_frames)

WORKER_DIED = (
    "a dataloader worker died, perhaps because memory was short; the same command again resumes from the "
    "newest checkpoint"
)


@dataclass(frozen=True)
class LoaderOptions:
    """Options of the dataloader.

    Attributes:
        workers: worker processes; 0 loads in the training process.
        prefetch_factor: steps that a worker prepares ahead; None for torch's default.
        pin_memory: put packs into page-locked memory, for a GPU.
    """

    workers: int = 0
    prefetch_factor: int | None = None
    pin_memory: bool = False

    def build(self, packs: PackDataset, sampler: StepSampler, *, keep_workers: bool) -> DataLoader:
        """Return the loader of a rank's packs, one step at a time.

        Args:
            packs: what is loaded.
            sampler: the records of each step.
            keep_workers: let the workers live on when an epoch ends.
        """
        # More workers than cores only get in each other's way.
        cores = max(1, (os.cpu_count() or 1) // distributed.local_world_size())
        workers = min(self.workers, cores)
        return DataLoader(
            packs,
            batch_sampler=sampler,
            collate_fn=list,
            num_workers=workers,
            pin_memory=self.pin_memory,
            persistent_workers=keep_workers and workers > 0,
            prefetch_factor=self.prefetch_factor if workers else None,
            worker_init_fn=_start_worker,
            # Its own, so that the start of an epoch does not advance the generator of dropout.
            generator=torch.Generator(),
        )


def _start_worker(_: int) -> None:
    """Keep a worker to one thread, and alive while its run is asked to stop.

    A scheduler that stops a job may send its signal to every process. A second SIGTERM ends the worker, and
    `end_workers` ends those that are left.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


def end_workers() -> None:
    """Kill the workers that are left when the program ends.

    Python would send them one SIGTERM, and wait for ever for those that ignore it.
    """
    # torch's handler would report their end as a failure.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


class StepLoader:
    """Iterates over the packs of a rank, from one step to the last of the run.

    Args:
        packs: what is loaded.
        sampler: the records of each step.
        options: of the dataloader.
    """

    def __init__(self, packs: PackDataset, sampler: StepSampler, options: LoaderOptions) -> None:
        self.packs, self.sampler = packs, sampler
        self.loader = options.build(packs, sampler, keep_workers=True)

    def steps(self, first: int, last: int) -> Iterator[list[Pack]]:
        """Yield the packs of each step from `first` to `last`, counted from 1.

        Raises:
            DataError: a record cannot be used.
            TrainingError: the packs are not those of the plan, or a worker died.
        """
        step = first
        while step <= last:
            epoch, done = self.sampler.position_of(step)
            self.sampler.set_epoch(epoch, skip=done)
            batches = iter(self.loader)
            while (packs := self._next(batches)) is not None:
                for pack in packs:
                    if isinstance(pack, DataError):
                        raise pack
                if count_records(packs) != self._planned(step):
                    raise TrainingError(f"step {step}: the dataloader returned other records than planned")
                yield packs
                step += 1
                if step > last:
                    return

    def _next(self, batches: Iterator[list[Pack | DataError]]) -> list[Pack | DataError] | None:
        try:
            return next(batches, None)
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            # What a worker still had to hand over is lost with it.
            if not self.loader.num_workers:
                raise
            raise TrainingError(f"{WORKER_DIED} ({error!r})") from None

    def _planned(self, step: int) -> Counter[RecordKey]:
        """Return this rank's records of a step, as the ledger will name them."""
        indices = [i for pack in self.sampler.packs(*self.sampler.position_of(step)) for i in pack]
        return Counter(self.packs.data.key_of(one.index) for one in indices if one.counts)


def count_records(packs: Iterable[Pack]) -> Counter[RecordKey]:
    """Return the records of packs with those that were skipped, without dummy samples."""
    found = Counter(
        key for pack in packs for key, counts in zip(pack.keys, pack.counts, strict=True) if counts
    )
    found.update(RecordKey(one.dataset, one.index) for pack in packs for one in pack.skipped)
    return found
