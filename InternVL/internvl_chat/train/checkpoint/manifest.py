"""The list of a checkpoint's files with their sizes and hashes, written last: what has one was once whole."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"

_VERSION = 1
# Hashing is bound by one core a file; disks deliver several files at a time.
_THREADS = 8


def write_manifest(folder: Path) -> None:
    """List all files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, hash_files(files), strict=True)
    }
    text = json.dumps({"version": _VERSION, "files": entries}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """Say what is wrong with a folder that should be as its manifest says; None if it is whole.

    Files that the manifest does not name are nobody's concern.
    """
    try:
        entries = _read_entries(folder / MANIFEST)
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was never finished"
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for name, (size, _) in entries.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found:,} bytes instead of {size:,}"
    try:
        hashes = hash_files(folder / name for name in entries)
        for (name, (_, digest)), found in zip(entries.items(), hashes, strict=True):
            if digest != found:
                return f"the content of {name} has changed since it was written"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    return None


def _read_entries(file: Path) -> dict[str, tuple[int, str]]:
    """Return size and hash of each file."""
    loaded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if loaded["version"] != _VERSION:
        raise ValueError(f"version {loaded['version']!r}; this program reads {_VERSION}")
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in loaded["files"].items()}


def hash_files(files: Iterable[Path]) -> Iterator[str]:
    """Yield the SHA-256 of each file's content, several at a time."""
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(_hash_file, files)


def _hash_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
