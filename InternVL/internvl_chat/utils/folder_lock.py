"""The lock of a folder that one process alone may write to; it goes with the process, however that ends."""

import fcntl
import os
import weakref
from pathlib import Path
from typing import IO

from internvl_chat.utils.errors import UsageError

LOCK = ".lock"

# Those that this process holds.
_locks: weakref.WeakSet[IO[str]] = weakref.WeakSet()


def _close_inherited_locks() -> None:
    """Give up the locks of the parent: a loader process that outlives it for a moment must not keep them."""
    for lock in list(_locks):
        lock.close()


os.register_at_fork(after_in_child=_close_inherited_locks)


def lock_folder(path: Path) -> IO[str]:
    """Take the folder's lock for as long as the returned file stays open.

    Raises:
        UsageError: another process holds it.
    """
    lock = (path / LOCK).open("a+")
    _locks.add(lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip()
        raise UsageError(f"{path}: another run (process {owner}) is writing to this output folder") from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def unlock_folder(lock: IO[str]) -> None:
    """Give the folder's lock back."""
    fcntl.flock(lock, fcntl.LOCK_UN)
    lock.close()
