"""Positions of images in tar shards: from the manifest or, without one, from the headers of the tar files.

A manifest has one JSON value per line: an object that lists the shards, then a list per image (`ImageRow`).
"""

import json
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from internvl_chat.data.storage.name_table import NameTable
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.files import sha256

MANIFEST = "manifest.jsonl"
_FORMAT = "m3llm image shards"
_VERSION = 1
# Names of tar shards in WebDataset's layout, and of the shards in a manifest.
_NUMBERED = re.compile(r".*\d\.tar")
_SHARD_NAME = re.compile(r"[\w.-]+\.tar")
_NUM_HASH_WORDS = 4


class Shard(NamedTuple):
    """A tar file in a manifest: name, size in bytes, and SHA-256."""

    file: str
    bytes: int
    sha256: str


class ImageRow(NamedTuple):
    """An image in a manifest.

    Attributes:
        name: path of the image in the records, `normalized`; also the name of the member in the shard.
        shard: 0-based number of the shard.
        offset: position of the image's first byte in the shard.
        bytes: size of the image.
        sha256: SHA-256 of the image.
    """

    name: str
    shard: int
    offset: int
    bytes: int
    sha256: str


class Member(NamedTuple):
    """Position of an image in its shard.

    Attributes:
        shard: file name of the shard.
        offset: position of the image's first byte in the shard.
        num_bytes: size of the image.
        version: number that changes with the content of the image.
        sha256: SHA-256 of the image; None if the shards have no manifest.
    """

    shard: str
    offset: int
    num_bytes: int
    version: int
    sha256: str | None


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Index of the images in shards.

    Attributes:
        shards: name of each shard, and its size in bytes.
        table: for each image, the number of its shard, its offset and size, and either its SHA-256 as four
            integers or a version number.
    """

    shards: Sequence[tuple[str, int]]
    table: NameTable

    def get(self, name: str) -> Member | None:
        """Return the position of an image; None if no shard contains it."""
        row = self.table.get(name)
        if row is None:
            return None
        shard, offset, num_bytes, *words = row
        hashed = np.array(words, np.int64).tobytes().hex() if len(words) == _NUM_HASH_WORDS else None
        return Member(self.shards[shard][0], offset, num_bytes, words[0] & (1 << 63) - 1, hashed)


def has_shards(folder: Path) -> bool:
    """Return whether a folder contains a manifest or numbered tar files."""
    return (folder / MANIFEST).is_file() or next(_tar_files(folder), None) is not None


def _tar_files(folder: Path) -> Iterator[Path]:
    try:
        yield from (file for file in sorted(folder.glob("*.tar")) if _NUMBERED.fullmatch(file.name))
    except OSError:
        return


def index_shards(folder: Path) -> ShardIndex:
    """Return the index of the shards in a folder.

    Raises:
        DataError: the manifest or a tar file is damaged, or a shard is missing.
    """
    manifest = folder / MANIFEST
    if manifest.is_file():
        index = read_manifest(manifest)
        check_shards(
            str(folder), index.shards, {file.name: file.stat().st_size for file in folder.glob("*.tar")}
        )
        return index
    files = [(file, file.stat()) for file in _tar_files(folder)]
    return _scan(tuple((file, status.st_size, status.st_mtime_ns) for file, status in files))


def check_shards(folder: str, shards: Iterable[tuple[str, int]], found: dict[str, int]) -> None:
    """Check that all shards of a manifest exist and have the expected sizes.

    Args:
        folder: folder or URL, for the message.
        shards: name and size of each shard in the manifest.
        found: size of each file in the folder.

    Raises:
        DataError: shards are missing or incomplete.
    """
    wrong = [name for name, size in shards if found.get(name) != size]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        problem = "size differs from" if wrong[0] in found else "missing, but listed in"
        raise DataError(
            f"{wrong[0]}{more}: {problem} {MANIFEST}; copy the shards again, or write them again with m3llm "
            "data shard",
            file=folder,
        )


def read_manifest(file: Path, location: str | None = None) -> ShardIndex:
    """Read a manifest. Each process reads it once, and again only if it has changed.

    Args:
        file: manifest file.
        location: path or URL, for messages (default: the path of the file).

    Raises:
        DataError: the manifest is damaged.
    """
    status = file.stat()
    return _read(file, status.st_size, status.st_mtime_ns, location or str(file))


@lru_cache(maxsize=16)
def _read(file: Path, _num_bytes: int, _mtime_ns: int, location: str) -> ShardIndex:
    try:
        with file.open("rb") as stream:
            header = json.loads(stream.readline())
            if not isinstance(header, dict):
                raise ValueError("its first line is not an object")
            if (header.get("format"), header.get("version")) != (_FORMAT, _VERSION):
                raise ValueError(f"expected format {_FORMAT!r}, version {_VERSION}")
            shards = [Shard(**shard) for shard in header["shards"]]
            names: list[str] = []
            rows = np.fromiter(_parse_rows(stream, shards, names), np.dtype((np.int64, 7)))
        if len(names) != header["images"]:
            raise ValueError(f"it lists {len(names):,} of {header['images']:,} images")
        table = _make_table(names, rows)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise DataError(
            f"this manifest of shards is damaged: {error}; copy it again, or write the shards again with "
            "m3llm data shard",
            file=location,
        ) from None
    return ShardIndex([(shard.file, shard.bytes) for shard in shards], table)


def _make_table(names: list[str], rows: np.ndarray) -> NameTable:
    try:
        return NameTable(names, rows)
    except ValueError:
        repeated = [name for name, count in Counter(names).items() if count > 1]
        raise ValueError(f"{repeated[0]!r:.200} occurs twice") from None


def _parse_rows(stream: Iterable[bytes], shards: Sequence[Shard], names: list[str]) -> Iterator[list[int]]:
    """Yield the row of each image for `ShardIndex.table`, and add its name to `names`."""
    if not all(_SHARD_NAME.fullmatch(shard.file) for shard in shards):
        raise ValueError("the name of a shard is not a plain file name")
    for line in stream:
        row = ImageRow(*json.loads(line))
        if not 0 <= row.offset <= row.offset + row.bytes <= shards[row.shard].bytes or row.shard < 0:
            raise ValueError(f"{row.name!r:.200} is outside its shard")
        words = np.frombuffer(bytes.fromhex(row.sha256), np.int64).tolist()
        if len(words) != _NUM_HASH_WORDS or not isinstance(row.name, str):
            raise ValueError(f"the row of {row.name!r:.200} is malformed")
        names.append(row.name)
        yield [row.shard, row.offset, row.bytes, *words]


def manifest_lines(shards: Sequence[Shard], images: Sequence[ImageRow]) -> Iterator[Any]:
    """Yield the JSON values of a manifest."""
    listed = [shard._asdict() for shard in shards]
    yield {"format": _FORMAT, "version": _VERSION, "images": len(images), "shards": listed}
    yield from images


@lru_cache(maxsize=16)
def _scan(files: Sequence[tuple[Path, int, int]]) -> ShardIndex:
    """Index tar files without a manifest by reading all headers.

    Args:
        files: path, size and modification time of each file.
    """
    names, rows = [], []
    for number, (file, num_bytes, mtime_ns) in enumerate(files):
        for member in tar_members(file):
            if member.offset_data + member.size > num_bytes:
                raise DataError(
                    f"this tar file is truncated in {member.name!r:.200}; copy it again", file=file
                )
            names.append(normalized(member.name))
            rows.append([number, member.offset_data, member.size, mtime_ns])
    try:
        table = _make_table(names, np.array(rows, np.int64).reshape(-1, 4))
    except ValueError as error:
        raise DataError(f"the tar files cannot be used: {error}", file=files[0][0].parent) from None
    return ShardIndex([(file.name, num_bytes) for file, num_bytes, _ in files], table)


def tar_members(file: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files in an uncompressed tar file; links and sparse files are skipped.

    Raises:
        DataError: the tar file is damaged or cannot be read.
    """
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse():
                    yield member
            # The library also stops at a damaged header.
            with file.open("rb") as stream:
                stream.seek(tar.offset)
                if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"damaged or truncated at byte {tar.offset:,}; copy it again")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"this tar file cannot be read: {error}", file=file) from None


def normalized(name: str) -> str:
    """Return an image name as used in shards: without `.`, `..` and repeated slashes.

    >>> normalized("./figures//2021/../a.jpg")
    'figures/a.jpg'
    """
    return posixpath.normpath(name)


def content_matches(content: bytes, member: Member) -> bool:
    """Return whether the content of an image has the size and the hash in the index."""
    return len(content) == member.num_bytes and member.sha256 in (None, sha256(content))
