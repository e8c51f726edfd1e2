"""Exclusive lock on an output folder; the operating system releases it when the process ends."""

import os
from pathlib import Path

from filelock import FileLock, Timeout

from internvl_chat.utils.errors import UsageError

LOCK = ".lock"


def lock_folder(folder: Path) -> FileLock:
    """Lock a folder without waiting; call `release` on the returned lock to unlock the folder.

    Raises:
        UsageError: another process holds the lock.
    """
    file = folder / LOCK
    lock = FileLock(file, blocking=False, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        owner = file.read_text(encoding="utf-8").strip()
        message = (
            f"{folder}: another run (process {owner}) is writing to this output folder; wait for it or "
            "stop it"
        )
        raise UsageError(message) from None
    file.write_text(str(os.getpid()), encoding="utf-8")
    return lock
