"""Manifest of a checkpoint: sizes and hashes of its files, written last to mark the folder as complete."""

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from internvl_chat.utils.files import file_sha256, write_json
from internvl_chat.utils.hashed_file import FileEntry

MANIFEST = "manifest.json"

_VERSION = 1
# Number of files that are hashed in parallel.
_THREADS = 8


def write_manifest(
    folder: Path,
    known: Mapping[str, FileEntry] | None = None,
    *,
    threads: int = _THREADS,
) -> None:
    """Write the manifest of all files in a folder and its subfolders.

    Args:
        known: entries of files that were hashed while being written, keyed by relative path.

    Raises:
        OSError: the manifest cannot be written, or a file in `known` is missing or has a different size (for
            example because the ranks do not share a disk).
    """
    entries = dict(known or {})
    for name, entry in entries.items():
        if (folder / name).stat().st_size != entry.bytes:
            raise OSError(f"{name} has changed since it was written")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    names = {path.relative_to(folder).as_posix(): path for path in files}
    unknown = {name: path for name, path in names.items() if name not in entries}
    for name, digest in zip(unknown, hash_files(unknown.values(), threads), strict=True):
        entries[name] = FileEntry(unknown[name].stat().st_size, digest)
    listed = {name: entries[name]._asdict() for name in names}
    write_json(folder / MANIFEST, {"version": _VERSION, "files": listed})


def find_damage(folder: Path) -> str | None:
    """Return a description of the first difference between a folder and its manifest, or None.

    Files that are not in the manifest are ignored.
    """
    try:
        entries = _read_entries(folder / MANIFEST)
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was never finished"
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for name, entry in entries.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != entry.bytes:
            return f"{name} has {size:,} bytes instead of {entry.bytes:,}"
    try:
        hashes = hash_files(folder / name for name in entries)
        for (name, entry), digest in zip(entries.items(), hashes, strict=True):
            if digest != entry.sha256:
                return f"the content of {name} has changed since it was written"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    return None


def _read_entries(file: Path) -> dict[str, FileEntry]:
    loaded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if loaded["version"] != _VERSION:
        raise ValueError(f"version {loaded['version']!r}; only {_VERSION} is supported")
    return {name: FileEntry(entry["bytes"], entry["sha256"]) for name, entry in loaded["files"].items()}


def hash_files(files: Iterable[Path], threads: int = _THREADS) -> Iterator[str]:
    """Yield the SHA-256 of each file, in order; multiple files are hashed in parallel."""
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(file_sha256, files)
