"""Folders that are made from other folders: there as a whole or not at all, and not made twice."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from internvl_chat.errors import ModelError
from internvl_chat.model.adapter import ADAPTER_WEIGHTS
from internvl_chat.model.folders import is_adapter
from internvl_chat.model.weights import weights_digest

STAMP = "made_from.json"


def stamp_of(source: Path, work: str) -> dict[str, str]:
    """Return what a folder made from `source` remembers: the work, and a hash of what it was done to."""
    if is_adapter(source):
        digest = hashlib.sha256((source / ADAPTER_WEIGHTS).read_bytes()).hexdigest()
    else:
        digest = weights_digest(source)
    return {"work": work, "source_sha256": digest}


def is_made(target: Path, stamp: dict[str, str]) -> bool:
    """Say whether a folder is the result of this work already.

    Raises:
        ModelError: it holds something else.
    """
    if target.exists() and not target.is_dir():
        raise ModelError(f"{target}: is a file; choose a folder")
    if not target.exists() or not any(target.iterdir()):
        return False
    try:
        found = json.loads((target / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None  # none of ours, and so nothing that may be written over
    if found != stamp:
        raise ModelError(
            f"{target}: exists and is not an earlier {stamp['work']} of the source; choose another folder"
        )
    return True


@contextlib.contextmanager
def making(target: Path, stamp: dict[str, str]) -> Iterator[Path]:
    """Yield a folder beside `target` to write into, which becomes `target` when all has gone well.

    Args:
        target: must be missing or empty.
        stamp: is written with it, for `is_made`.
    """
    staging = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        (staging / STAMP).write_text(json.dumps(stamp) + "\n", encoding="utf-8")
        if target.exists():
            target.rmdir()
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
