"""Folders that are made from other folders: there as a whole or not at all, and not made twice."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internvl_chat.model.io.adapter import ADAPTER_WEIGHTS
from internvl_chat.model.io.folders import is_adapter
from internvl_chat.model.io.weights import weights_digest
from internvl_chat.utils.errors import ModelError
from internvl_chat.utils.folder_lock import LOCK, lock_folder, unlock_folder

STAMP = "made_from.json"
# Settings and vocabularies, as a model folder has them; what else a run writes into it changes no result.
_SETTINGS = (
    "*config.json", "preprocessing.json", "base_model.json", "*token*.json", "vocab.json", "merges.txt",
    "*.model", "chat_template.*", "*.index.json", "*.py",
)  # fmt: skip


def check_target(target: Path, source: Path) -> None:
    """Raise `ModelError` if the target is no folder, or within its source, which nothing may change."""
    if target.exists() and not target.is_dir():
        raise ModelError(f"{target}: is a file; choose a folder")
    if source.resolve() in target.resolve().parents:
        raise ModelError(f"{target}: is within {source}, which is read; choose another folder")


def stamp_of(source: Path, work: str) -> dict[str, Any]:
    """Return what a folder made from `source` remembers: the work, and a hash of all that it was done to."""
    if is_adapter(source):
        digest = hashlib.sha256((source / ADAPTER_WEIGHTS).read_bytes())
    else:
        digest = hashlib.sha256(weights_digest(source).encode())
    for file in sorted({file for pattern in _SETTINGS for file in source.glob(pattern)}):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return {"work": work, "source_sha256": digest.hexdigest()}


def is_made(target: Path, stamp: dict[str, Any], *, checked: bool) -> bool:
    """Say whether a folder is the result of this work already, with all of its files.

    Args:
        target: the folder, after `check_target`.
        stamp: of the work.
        checked: whether the result must have been compared with its source.

    Raises:
        ModelError: it holds something else, or not all.
    """
    if not target.exists() or not any(target.iterdir()):
        return False
    try:
        found = dict(json.loads((target / STAMP).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        found = {}  # none of ours, and so nothing that may be written over
    files, was_checked = found.pop("files", {}), found.pop("checked", False)
    if found != stamp:
        raise ModelError(
            f"{target}: exists and is not an earlier {stamp['work']} of the source as it is now; choose "
            "another folder"
        )
    changed = sorted(files.items() - _sizes(target).items())
    if changed:
        raise ModelError(
            f"{target}: {changed[0][0]} is missing or has changed since it was made; delete the folder"
        )
    if checked and not was_checked:
        raise ModelError(
            f"{target}: was made without being compared with its source; delete the folder, or give "
            "--check False"
        )
    return True


@contextlib.contextmanager
def making(target: Path, stamp: dict[str, Any], *, checked: bool) -> Iterator[Path]:
    """Yield a folder beside `target` to write into, which becomes `target` when all has gone well.

    Args:
        target: must be missing or empty.
        stamp: is written with it, for `is_made`.
        checked: whether the result is compared with its source.

    Raises:
        UsageError: another process is making it.
        ModelError: another process has made it since it was looked at.
    """
    staging = target.with_name(f".{target.name}.partial")
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"{target}: the folder cannot be made: {error.strerror}") from None
    lock = lock_folder(staging)
    try:
        if target.exists() and any(target.iterdir()):
            raise ModelError(f"{target}: another process has made it in the meantime")
        _empty(staging)
        yield staging
        made = {"checked": checked, "files": _sizes(staging)}
        (staging / STAMP).write_text(json.dumps(stamp | made, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            target.rmdir()
        staging.rename(target)
        # Not before: another process would take the folder for one that nobody is making.
        (target / LOCK).unlink()
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        unlock_folder(lock)


def _empty(folder: Path) -> None:
    """Delete what an earlier process left in a folder, but not its lock."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each file of a folder, by its path in it."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and path.name != LOCK
    }
