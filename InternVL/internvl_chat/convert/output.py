"""Write a conversion's output folder atomically, or skip the conversion if its output is already complete."""

import contextlib
import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from internvl_chat.model.io.adapter import ADAPTER_WEIGHTS
from internvl_chat.model.io.folders import is_adapter, read_auxiliary_files
from internvl_chat.model.io.weights import weights_digest
from internvl_chat.utils.errors import ModelError
from internvl_chat.utils.files import write_json
from internvl_chat.utils.folder_lock import LOCK, lock_folder

STAMP = "made_from.json"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# Files of a model folder that affect a conversion, in addition to weights and auxiliary files.
_SETTINGS = ("config.json", "adapter_config.json", "base_model.json", "*.index.json")


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion.

    Attributes:
        merged_layers: number of layers into which adapters were merged.
        already_done: whether the folder was already complete, so that nothing was written.
    """

    folder: Path
    merged_layers: int = 0
    already_done: bool = False


class ConversionOutput:
    """Target folder of a conversion; the file `made_from.json` in it records a hash of the source.

    Args:
        kind: name of the conversion, for example `merge`.
        check: called with the finished folder before it is moved into place; if it raises, the folder is
            deleted.

    Raises:
        ModelError: the target is a file, or is inside the source.
    """

    def __init__(
        self, target: Path, source: Path, kind: str, check: Callable[[Path], None] | None = None
    ) -> None:
        if target.exists() and not target.is_dir():
            raise ModelError(f"{target}: is a file; choose a folder")
        if source.resolve() in target.resolve().parents:
            raise ModelError(f"{target}: is inside its source {source}; choose a different folder")
        self.target, self.check = target, check
        self.stamp = {"work": kind, "source_sha256": _source_digest(source)}

    def is_complete(self) -> bool:
        """Return whether the target already contains the complete result of this conversion.

        Raises:
            ModelError: the target contains other files or is incomplete, or a check is requested and it was
                written without one.
        """
        if not self.target.exists() or not any(self.target.iterdir()):
            return False
        try:
            stamp = dict(json.loads((self.target / STAMP).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            stamp = {}  # not written by a conversion, so it must not be overwritten
        files, checked = stamp.pop("files", {}), stamp.pop("checked", False)
        if stamp != self.stamp:
            raise ModelError(
                f"{self.target}: already exists and was not created by this command from the current source; "
                "choose a different folder"
            )
        changed = sorted(files.items() - _sizes(self.target).items())
        if changed:
            raise ModelError(
                f"{self.target}: {changed[0][0]} is missing or has changed since it was written; "
                "delete the folder"
            )
        if self.check and not checked:
            raise ModelError(
                f"{self.target}: was written without being compared with its source; delete the folder, or "
                "pass --check False"
            )
        return True

    @contextlib.contextmanager
    def write(self) -> Iterator[Path]:
        """Yield a staging folder next to the target; on success, check it and rename it to the target.

        Raises:
            UsageError: another process is writing the target.
            ModelError: a file cannot be written, or another process wrote the target in the meantime.
        """
        target = self.target
        staging = target.with_name(f".{target.name}.partial")
        try:
            staging.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelError(f"{target}: the folder cannot be created: {error.strerror}") from None
        lock = lock_folder(staging)
        try:
            if target.exists() and any(target.iterdir()):
                raise ModelError(f"{target}: was written by another process in the meantime")
            _clear(staging)
            yield staging
            if self.check:
                self.check(staging)
            outcome = {"checked": self.check is not None, "files": _sizes(staging)}
            write_json(staging / STAMP, self.stamp | outcome)
            if target.exists():
                target.rmdir()
            staging.rename(target)
            # Deleting the lock file earlier would allow another process to lock the staging folder.
            (target / LOCK).unlink()
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            if error.errno not in _DISK_ERRORS:
                raise
            raise ModelError(
                f"{error.filename or target}: {error.strerror} (the incomplete result was deleted); check "
                f"the disk and the free space in {target.parent}"
            ) from None
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            lock.release()


def _source_digest(source: Path) -> str:
    """Return a hash of all files that a conversion reads from a model folder."""
    if is_adapter(source):
        digest = hashlib.sha256((source / ADAPTER_WEIGHTS).read_bytes())
    else:
        digest = hashlib.sha256(weights_digest(source).encode())
    settings = {file.name: file.read_bytes() for pattern in _SETTINGS for file in source.glob(pattern)}
    for name, content in sorted((settings | read_auxiliary_files(source)).items()):
        digest.update(name.encode() + b"\0" + content + b"\0")
    return digest.hexdigest()


def _clear(folder: Path) -> None:
    """Delete everything in a folder except its lock file."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of each file in a folder, keyed by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and path.name != LOCK
    }
