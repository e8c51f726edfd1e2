"""Write large files: compute the SHA-256 while writing, and drop the pages from the page cache."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

# Number of bytes between two syncs.
_CHUNK = 2**26


class FileEntry(NamedTuple):
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str


class HashedFile:
    """Context manager that writes a new file and computes its SHA-256.

    Each chunk is synced to disk and dropped from the page cache. Otherwise, gigabytes of dirty pages would
    evict the training data and slow down all processes.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("wb", buffering=0)
        self._hash, self._size, self._unsynced = hashlib.sha256(), 0, 0

    def write(self, data: bytes | memoryview) -> None:
        """Write all of the data, with several system calls if needed."""
        view = memoryview(data)
        while view:
            chunk = view[: _CHUNK - self._unsynced]
            try:
                written = self._file.write(chunk)
            except OSError as error:  # add the file name, which is missing if the disk is full
                raise OSError(error.errno, error.strerror, str(self._path)) from None
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
        try:
            drop_from_cache(self._file.fileno())
        except OSError as error:  # a full disk may be detected only here
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        self._unsynced = 0


def drop_from_cache(descriptor: int) -> None:
    """Sync a file to disk and drop it from the page cache."""
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
