"""Write large files: hash them on the way and drop them from the page cache."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# Bytes between two syncs.
_CHUNK = 2**26

# Called after each chunk of work with its duration in seconds; may sleep to yield the CPU.
Pause = Callable[[float], None]


def no_pause(seconds: float) -> None:
    """Return immediately; the default, without throttling."""


class FileEntry(NamedTuple):
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str


class HashedFile:
    """Context manager that writes a new file and computes its SHA-256.

    Every chunk is synced to disk and dropped from the page cache: gigabytes of dirty pages would evict the
    training data and slow down every process.

    Args:
        pause: called after each chunk with the seconds since the previous call; may sleep.
    """

    def __init__(self, path: Path, pause: Pause = no_pause) -> None:
        self._file, self._pause = path.open("wb", buffering=0), pause
        self._hash, self._size, self._unsynced = hashlib.sha256(), 0, 0
        self._began = time.perf_counter()

    def write(self, data: bytes | memoryview) -> None:
        """Write all of the data."""
        view = memoryview(data)
        while view:
            chunk = view[: _CHUNK - self._unsynced]
            written = self._file.write(chunk)
            self._hash.update(chunk[:written])
            self._size, self._unsynced = self._size + written, self._unsynced + written
            view = view[written:]
            if self._unsynced >= _CHUNK:
                self._sync()

    def entry(self) -> FileEntry:
        """Return the size and hash of the bytes written so far."""
        return FileEntry(self._size, self._hash.hexdigest())

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None:
                self._sync()

    def _sync(self) -> None:
        drop_from_cache(self._file.fileno())
        self._unsynced = 0
        self._pause(time.perf_counter() - self._began)
        self._began = time.perf_counter()


def drop_from_cache(descriptor: int) -> None:
    """Sync a file to disk and free its page cache."""
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
