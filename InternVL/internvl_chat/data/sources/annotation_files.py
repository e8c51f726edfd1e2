"""Open annotation files: unpack gzip and Parquet, and reject unsupported formats with a single error."""

import gzip
import json
import re
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from internvl_chat.utils.errors import DataError

_HEAD = 1 << 12
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
# Magic bytes of unsupported formats.
_OTHER_FORMATS = {
    b"PK\x03\x04": "a ZIP archive (or an Excel table); unpack it, or save it as JSONL",
    b"BZh": "compressed with bzip2; unpack it (bunzip2)",
    b"\xfd7zXZ": "compressed with xz; unpack it (unxz)",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it (unzstd)",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"ARROW1": "an Arrow file; save it as JSONL or Parquet",
    b"SQLite format 3": "an SQLite database; save its table as JSONL",
    b"version https://git-lfs": "a Git LFS pointer instead of the file; run git lfs pull",
    b"<!DOCTYPE": "an HTML page instead of the file; download it again",
    b"<html": "an HTML page instead of the file; download it again",
}
_WIDE_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_MAX_LISTED = 5
# Number of lines to parse at the start of a file.
_TRIED_LINES = 20
# Minimum number of invalid lines to reject a file that looks like JSON.
_MIN_BAD_LINES = 10
# Maximum number of bytes to parse, per line and at the start of the file.
_MAX_OBJECT = 1 << 20
_ROWS = 1 << 10


class Source(NamedTuple):
    """Uncompressed file with the records of an annotation file.

    Attributes:
        path: the annotation file itself, or a temporary uncompressed copy.
        is_array: whether the file is a JSON array; otherwise it has one record per line.
    """

    path: Path
    is_array: bool


def open_source(path: Path) -> Source:
    """Return the uncompressed file with the records of an annotation file.

    gzip and Parquet files are unpacked into a temporary folder, once per process.

    Raises:
        DataError: the file is damaged or has an unsupported format.
        OSError: the file cannot be read.
    """
    if path.is_dir():
        raise DataError(f"cannot be read: it is a folder; use one file{_examples(path)}", file=path)
    head = _head(path)
    name = path.name.lower().removesuffix(".gz")
    if head.startswith((_GZIP, _PARQUET)):
        status = path.stat()
        is_gzip = head.startswith(_GZIP)
        path, origin = _unpack(path, status.st_size, status.st_mtime_ns, is_gzip), path
        head = _head(path)
        if head.startswith((_GZIP, _PARQUET)):
            raise DataError("is compressed twice; decompress it once", file=origin)
        _reject_other_formats(head, origin)
        return Source(path, is_gzip and name.endswith(".json"))
    _reject_other_formats(head, path)
    return Source(path, name.endswith(".json"))


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(_HEAD)


def _examples(folder: Path) -> str:
    names = sorted(
        file.name for file in folder.iterdir() if file.suffix in (".jsonl", ".json", ".gz", ".parquet")
    )
    more = ", ..." if len(names) > _MAX_LISTED else ""
    return f" per dataset: {', '.join(names[:_MAX_LISTED])}{more}" if names else ""


def _reject_other_formats(head: bytes, path: Path) -> None:
    """Raise a `DataError` if a file has an unsupported format or encoding."""
    for start, description in _OTHER_FORMATS.items():
        if head.startswith(start):
            raise DataError(f"this is {description}", file=path)
    encoding = next((name for mark, name in _WIDE_MARKS.items() if head.startswith(mark)), None)
    if encoding is None and head[:2] in (b"{\0", b"[\0", b"\0{", b"\0["):
        encoding = "UTF-16"
    if encoding:
        command = f"iconv -f {encoding} -t UTF-8 {path.name} > new.jsonl"
        raise DataError(
            f"the text is in {encoding}; convert it to UTF-8: {command}", file=path, kind="encoding"
        )


@lru_cache(maxsize=1)
def _folder() -> tempfile.TemporaryDirectory:
    """Return a temporary folder that is deleted when this process ends."""
    return tempfile.TemporaryDirectory(prefix="m3llm-records-")


@lru_cache(maxsize=1 << 10)
def _unpack(path: Path, num_bytes: int, mtime_ns: int, is_gzip: bool) -> Path:
    """Write an uncompressed copy of a gzip or Parquet file and return its path."""
    folder = _folder().name
    blocks = _gzip_blocks(path) if is_gzip else _parquet_rows(path)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".jsonl", delete=False) as target:
            target.writelines(blocks)
    except OSError as error:  # a write error; read errors are raised as DataError
        raise DataError(
            f"cannot be unpacked into {folder}: {error}; if the disk is full, set TMPDIR to a folder with "
            "more free space",
            file=path,
        ) from None
    return Path(target.name)


def _gzip_blocks(path: Path) -> Iterator[bytes]:
    """Yield the decompressed content of a gzip file in blocks.

    Raises:
        DataError: the file is damaged or cannot be read.
    """
    try:
        with gzip.open(path, "rb") as stream:
            while block := stream.read(1 << 24):
                yield block
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(f"cannot be unpacked: {error}", file=path) from None


def _parquet_rows(path: Path) -> Iterator[bytes]:
    """Yield the rows of a Parquet file as JSON lines.

    Raises:
        DataError: the file is damaged or cannot be read, or has values that JSON does not support.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(
            "this is a Parquet file; install pyarrow to read it (pip install pyarrow), or save it as JSONL",
            file=path,
        ) from None

    def reject(value: Any) -> NoReturn:
        if isinstance(value, bytes):
            raise DataError(
                "a column contains binary data; save embedded images as files and use their paths instead",
                file=path,
            )
        raise DataError(f"a column contains {type(value).__name__} values; convert them to text", file=path)

    try:
        for batch in ParquetFile(path).iter_batches(_ROWS):
            for row in batch.to_pylist():
                yield (
                    json.dumps(row, ensure_ascii=False, default=reject).encode("utf-8", "surrogatepass")
                    + b"\n"
                )
    except (ArrowException, OSError) as error:
        raise DataError(f"this Parquet file cannot be read: {error}", file=path) from None


def check_lines(source: Path, path: Path, spans: Sequence[Sequence[int]]) -> None:
    """Raise a single error for a file that is not JSONL, instead of one error per line.

    Args:
        source: uncompressed file.
        path: annotation file, for error messages.
        spans: start and end offsets of the first lines.

    Raises:
        DataError: the file is a JSON array, begins with a multi-line object, or its first lines are not JSON.
    """
    with source.open("rb") as stream:
        stream.seek(spans[0][0])
        text = stream.read(_MAX_OBJECT).decode("utf-8", "replace").lstrip()
        lines = []
        for start, end in spans[:_TRIED_LINES]:
            stream.seek(start)
            lines.append(stream.read(min(end - start, _MAX_OBJECT)))
            if _is_json(lines[-1]):
                break
    if _starts_array(text, lines, len(spans)):
        raise DataError(
            "this is a JSON array, not one record per line; rename it to .json (or .json.gz)", file=path
        )
    if len(spans) == 1 or (len(lines) == 1 and _is_json(lines[0])):
        return
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        pass
    else:
        if isinstance(value, dict) and "\n" in text[:end]:
            raise DataError(_describe_object(value, text[end:].strip()), file=path)
    looks_like_json = any(line.lstrip().startswith(b"{") for line in lines)
    if not _is_json(lines[-1]) and (len(lines) >= _MIN_BAD_LINES or not looks_like_json):
        first = lines[0][:60].decode("utf-8", "replace").strip()
        raise DataError(
            f"none of the first {len(lines)} lines is valid JSON (the file begins with {first!r}); expected "
            "one JSON object per line",
            file=path,
        )


def _starts_array(text: str, lines: Sequence[bytes], num_lines: int) -> bool:
    """Return whether the file is a JSON array of objects, rather than JSONL whose first record is a list."""
    if not re.match(r"\[\s*\{", text):
        return False
    return not _is_json(lines[0]) or num_lines == 1


def _is_json(line: bytes) -> bool:
    """Return whether a line is valid JSON; True for lines that were only read in part."""
    if len(line) == _MAX_OBJECT:
        return True
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _describe_object(value: dict[str, Any], rest: str) -> str:
    """Return an error message for a file that begins with a multi-line JSON object."""
    if value and all(isinstance(entry, dict) and "annotation" in entry for entry in value.values()):
        return "this is a meta file, not a file of records"
    if not rest:
        return "this is a single multi-line JSON object; write one record per line, or an array (.json)"
    return (
        "the records span multiple lines; write one per line (jq -c . FILE), or an array in a .json file "
        "(jq -s . FILE)"
    )
