"""Sizes and hashes of the files of a checkpoint, written last: a folder with a manifest is complete."""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from internvl_chat.utils.hashed_file import FileEntry, Pause, no_pause

MANIFEST = "manifest.json"

_VERSION = 1
# Hashing is bound by one core a file; disks deliver several files at a time.
_THREADS = 8
_PIECE = 2**26


def write_manifest(
    folder: Path,
    known: Mapping[str, FileEntry] | None = None,
    *,
    threads: int = _THREADS,
    pause: Pause = no_pause,
) -> None:
    """List all files below a folder.

    Args:
        folder: of the checkpoint.
        known: entries by relative name of files that were hashed while they were written.
        threads: that hash the other files.
        pause: as for `HashedFile`, while they do.

    Raises:
        OSError: a file is not as it was written, as where ranks do not share the disk.
    """
    entries = dict(known or {})
    for name, entry in entries.items():
        if (folder / name).stat().st_size != entry.bytes:
            raise OSError(f"{name} is not as it was written")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    names = {path.relative_to(folder).as_posix(): path for path in files}
    unknown = {name: path for name, path in names.items() if name not in entries}
    for name, digest in zip(unknown, hash_files(unknown.values(), threads, pause), strict=True):
        entries[name] = FileEntry(unknown[name].stat().st_size, digest)
    listed = {name: entries[name]._asdict() for name in names}
    text = json.dumps({"version": _VERSION, "files": listed}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """Return what differs between a folder and its manifest; None if nothing does.

    Files that the manifest does not name are ignored.
    """
    try:
        entries = _read_entries(folder / MANIFEST)
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was never finished"
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for name, entry in entries.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != entry.bytes:
            return f"{name} has {found:,} bytes instead of {entry.bytes:,}"
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
        raise ValueError(f"version {loaded['version']!r}; this program reads {_VERSION}")
    return {name: FileEntry(entry["bytes"], entry["sha256"]) for name, entry in loaded["files"].items()}


def hash_files(files: Iterable[Path], threads: int = _THREADS, pause: Pause = no_pause) -> Iterator[str]:
    """Yield the SHA-256 of each file's content, several at a time."""

    def digest(file: Path) -> str:
        found = hashlib.sha256()
        with file.open("rb", buffering=0) as stream:
            began = time.perf_counter()
            while piece := stream.read(_PIECE):
                found.update(piece)
                pause(time.perf_counter() - began)
                began = time.perf_counter()
        return found.hexdigest()

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(digest, files)
