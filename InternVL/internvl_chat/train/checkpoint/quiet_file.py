"""A file that is written beside training without crowding it out of memory or processor."""

import io
import os
import time
from collections.abc import Callable
from pathlib import Path

_PIECE = 2**26


class QuietFile(io.FileIO):
    """A new file whose bytes go to the disk piece by piece and leave the page cache, where records are.

    Many gigabytes written at once would first fill the memory, which costs more processor time than all else.

    Args:
        path: of the file.
        pause: is called after each piece with the seconds that it took.
    """

    def __init__(self, path: Path, pause: Callable[[float], None]) -> None:
        super().__init__(path, "w")
        self._pause, self._pending = pause, 0

    def write(self, data: bytes | memoryview) -> int:
        """Write all of the data."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            began = time.perf_counter()
            written = super().write(view[done : done + _PIECE - self._pending])
            done += written
            self._pending += written
            if self._pending >= _PIECE:
                self._flush_to_disk()
                self._pause(time.perf_counter() - began)
        return done

    def _flush_to_disk(self) -> None:
        os.fsync(self.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._pending = 0
