"""Large files that are hashed while they are written, and leave the page cache."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# Bytes between two syncs.
_PIECE = 2**26

# Is called after each piece of work with the seconds that it took, and may rest.
Pause = Callable[[float], None]


def no_pause(seconds: float) -> None:
    """Do not rest."""


class FileEntry(NamedTuple):
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str


class HashedFile:
    """A new file that is hashed while it is written, as a context.

    Its bytes are synced to the disk and leave the page cache piece by piece: gigabytes of dirty pages would
    displace the training data and slow down every process.

    Args:
        path: of the file.
        pause: may rest after each piece.
    """

    def __init__(self, path: Path, pause: Pause = no_pause) -> None:
        self._file, self._pause = path.open("wb", buffering=0), pause
        self._hash, self._size, self._unsynced = hashlib.sha256(), 0, 0
        self._began = time.perf_counter()

    def write(self, data: bytes | memoryview) -> None:
        """Write all of the data."""
        view = memoryview(data)
        while view:
            piece = view[: _PIECE - self._unsynced]
            written = self._file.write(piece)
            self._hash.update(piece[:written])
            self._size, self._unsynced = self._size + written, self._unsynced + written
            view = view[written:]
            if self._unsynced >= _PIECE:
                self._sync()

    def entry(self) -> FileEntry:
        """Return the size and hash of what was written."""
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
    """Bring a file's content to the disk and free its page cache."""
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
