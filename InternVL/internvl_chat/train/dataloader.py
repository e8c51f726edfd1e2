"""The loader of the packs: how its processes begin and end, and what it brought or died of."""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import DataLoader

from internvl_chat.data.collator import Pack, PackDataset
from internvl_chat.data.order import StepSampler
from internvl_chat.data.record_set import RecordKey
from internvl_chat.train.arguments import RunArguments
from internvl_chat.utils.errors import TrainingError

# A loader process that is forked while a thread of torch enters Python would wait for that thread's lock for
# ever (CPython before 3.11.10 and 3.12, https://github.com/python/cpython/issues/112275). This takes the same
# lock, and so waits until it is free: under constant contention 1 fork in 4,000 hangs, and 1 in 90 without.
os.register_at_fork(before=sys._current_frames)

LOADER_ENDED = (
    "a loader process was ended, perhaps because memory was short; the same command again goes on from the "
    "newest checkpoint"
)


def build_loader(
    args: RunArguments, packs: PackDataset, sampler: StepSampler, *, keep_workers: bool
) -> DataLoader:
    """Return the loader of a process's shares of the steps.

    Args:
        args: of the run.
        packs: what is loaded.
        sampler: deals the records.
        keep_workers: let the loader processes live on when an epoch ends.
    """
    # More loader processes than cores only get in each other's way.
    cores = max(1, (os.cpu_count() or 1) // args.processes_here)
    workers = min(args.dataloader_num_workers, cores)
    return DataLoader(
        packs,
        batch_sampler=sampler,
        collate_fn=list,
        num_workers=workers,
        pin_memory=args.device.type == "cuda",
        persistent_workers=keep_workers and workers > 0,
        prefetch_factor=args.dataloader_prefetch_factor if workers else None,
        worker_init_fn=_begin_worker,
        # Its own, so that beginning an epoch does not advance the randomness of dropout.
        generator=torch.Generator(),
    )


def _begin_worker(_: int) -> None:
    """Keep a loader process to one thread, as there are several, and alive while its run is asked to stop.

    What asks a job to stop may send its signal to every process. A second SIGTERM is torch's own. Such a
    process must be ended by `end_workers`.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


def end_workers() -> None:
    """End the loader processes that are left when the program ends.

    Python would send them one SIGTERM, and wait for ever for those that pass over it.
    """
    # torch's handler would take their end for an accident.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


@contextlib.contextmanager
def naming_ended_worker(workers: int) -> Iterator[None]:
    """Fetch from a loader with so many processes.

    Raises:
        TrainingError: one of them was ended.
    """
    try:
        yield
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        # What a loader process still had to hand over went with it.
        if not workers:
            raise
        raise TrainingError(f"{LOADER_ENDED} ({error!r})") from None


def count_records(packs: Iterable[Pack]) -> Counter[RecordKey]:
    """Return the records of packs, with those that were skipped and without fillers."""
    found = Counter(
        key for pack in packs for key, counts in zip(pack.keys, pack.counts, strict=True) if counts
    )
    found.update(RecordKey(one.dataset, one.index) for pack in packs for one in pack.skipped)
    return found
