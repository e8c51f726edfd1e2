"""Local cache of downloaded images, with a size limit, shared by all processes on a machine."""

import os
import time
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

from internvl_chat.data.storage.transfer import env_number
from internvl_chat.utils.files import atomic_path, sha256
from internvl_chat.utils.logging import get_logger
from internvl_chat.utils.paths import default_cache

logger = get_logger(__name__)

_LIMIT_GB = 20.0
# A cleanup deletes files until at most this fraction of the limit is used.
_KEPT_FRACTION = 0.9
# Older temporary files were left by a killed process.
_MAX_PARTIAL_SECONDS = 3600.0


def image_cache() -> "ImageCache":
    """Return the cache in `images` in the cache folder, limited to `$M3LLM_CACHE_GB`, or 20 GB.

    Raises:
        UsageError: the variable is not a number.
    """
    limit = env_number("M3LLM_CACHE_GB", _LIMIT_GB, "a number of gigabytes; 0 disables the cache of images")
    return _cache(default_cache() / "images", int(limit * 1e9))


@lru_cache(maxsize=4)
def _cache(folder: Path, limit: int) -> "ImageCache":
    return ImageCache(folder, limit)


class ImageCache:
    """File cache with a size limit; deletes the least recently used files.

    Files are renamed to their final name when they are complete. A process that reads a file while another
    one deletes it can read it to the end. The total size is stored in a file protected by a lock, so that
    adding a file does not require listing the folder. If the folder is not writable, nothing is cached.

    Args:
        folder: folder of the cache, created when needed.
        limit: maximum total size in bytes.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._total = folder / "total_bytes"
        self._warned = False

    def get(self, key: str, num_bytes: int) -> bytes | None:
        """Return the content stored under a key and mark it as used; None if it is missing or incomplete.

        Args:
            key: key given to `put`.
            num_bytes: size of the complete content.
        """
        file = self._file(key)
        try:
            content = file.read_bytes()
            os.utime(file)
        except OSError:
            return None
        # After a power failure, a file may be incomplete.
        return content if len(content) == num_bytes else None

    def put(self, key: str, content: bytes) -> None:
        """Store content under a key; if the cache cannot be written, log a warning once."""
        file = self._file(key)
        if len(content) > self.limit * _KEPT_FRACTION:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock"):
                self._reserve(len(content))
            with atomic_path(file) as partial:
                partial.write_bytes(content)
        except (OSError, NotImplementedError) as error:
            if not self._warned:
                self._warned = True
                logger.warning(
                    "cannot write the image cache: %s; images are downloaded each time they are used. Set "
                    "M3LLM_CACHE to a different folder", error,
                )  # fmt: skip

    def _file(self, key: str) -> Path:
        name = sha256(key.encode("utf-8", "surrogatepass"))
        return self.folder / name[:2] / name[2:]

    def _reserve(self, num_bytes: int) -> None:
        """Add to the total size; first delete files if it would exceed the limit. Requires the lock."""
        try:
            total = int(self._total.read_bytes())
        except (OSError, ValueError):
            total = self.limit + 1  # unknown: `_clean` measures it
        if total + num_bytes > self.limit:
            total = self._clean(int(self.limit * _KEPT_FRACTION) - num_bytes)
        self._total.write_bytes(b"%d" % (total + num_bytes))

    def _clean(self, kept: int) -> int:
        """Delete the least recently used files until at most `kept` bytes remain; return the new total."""
        now, files = time.time(), []
        for folder in self.folder.iterdir():
            if not folder.is_dir():
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    try:
                        status = entry.stat()
                    except FileNotFoundError:
                        continue
                    abandoned = (
                        entry.name.endswith(".partial") and now - status.st_mtime > _MAX_PARTIAL_SECONDS
                    )
                    files.append((0.0 if abandoned else status.st_mtime, status.st_size, entry.path))
        total = sum(size for _, size, _ in files)
        for used, size, path in sorted(files):
            if total <= kept and used:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        return total
