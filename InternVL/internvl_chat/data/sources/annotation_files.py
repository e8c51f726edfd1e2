"""Annotation files in any encoding and layout: unpack what can be read, and name the rest in one message."""

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
# Starts of files that are not read.
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
# Lines that are tried before a file is refused as a whole, and bytes of an object that spans several lines.
_TRIED_LINES = 20
_MIN_BAD_LINES = 10
_MAX_OBJECT = 1 << 20
_ROWS = 1 << 10


class Source(NamedTuple):
    """A plain file with the records of an annotation file.

    Attributes:
        path: the annotation file, or a temporary copy that is not compressed.
        is_array: whether it is a JSON array, otherwise it has one record per line.
    """

    path: Path
    is_array: bool


def open_source(path: Path) -> Source:
    """Return the plain file with the records of an annotation file.

    gzip and Parquet are unpacked into a temporary folder, once per process.

    Raises:
        DataError: the file is of another kind; says of which.
        OSError: it cannot be read.
    """
    if path.is_dir():
        raise DataError(f"cannot be read: it is a folder; give one file{_examples(path)}", file=path)
    head = _head(path)
    name = path.name.lower().removesuffix(".gz")
    if head.startswith((_GZIP, _PARQUET)):
        status = path.stat()
        is_gzip = head.startswith(_GZIP)
        path, origin = _unpack(path, status.st_size, status.st_mtime_ns, is_gzip), path
        head = _head(path)
        if head.startswith((_GZIP, _PARQUET)):
            raise DataError("is packed twice; unpack it once", file=origin)
        _refuse_other(head, origin)
        return Source(path, is_gzip and name.endswith(".json"))
    _refuse_other(head, path)
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


def _refuse_other(head: bytes, path: Path) -> None:
    """Raise a `DataError` for a file of another format or encoding."""
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
    """Return a folder that is deleted when this process ends."""
    return tempfile.TemporaryDirectory(prefix="m3llm-records-")


@lru_cache(maxsize=1 << 10)
def _unpack(path: Path, num_bytes: int, mtime_ns: int, is_gzip: bool) -> Path:
    """Write a plain copy of a packed file."""
    with tempfile.NamedTemporaryFile(dir=_folder().name, suffix=".jsonl", delete=False) as target:
        try:
            for block in _gzip_blocks(path) if is_gzip else _parquet_rows(path):
                target.write(block)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"cannot be unpacked: {error}", file=path) from None
        except OSError as error:
            raise DataError(
                f"cannot be unpacked into {_folder().name}: {error}; set TMPDIR to a larger folder", file=path
            ) from None
    return Path(target.name)


def _gzip_blocks(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") as stream:
        while block := stream.read(1 << 24):
            yield block


def _parquet_rows(path: Path) -> Iterator[bytes]:
    """Yield the rows of a Parquet file as lines of JSON."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(
            "this is a Parquet file; reading it needs pyarrow (pip install pyarrow), or save it as JSONL",
            file=path,
        ) from None

    def refuse(value: Any) -> NoReturn:
        if isinstance(value, bytes):
            raise DataError(
                "a column holds the content of files; save the images as files and give their names",
                file=path,
            )
        raise DataError(f"a column holds {type(value).__name__} values; convert them to text", file=path)

    try:
        for batch in ParquetFile(path).iter_batches(_ROWS):
            for row in batch.to_pylist():
                yield (
                    json.dumps(row, ensure_ascii=False, default=refuse).encode("utf-8", "surrogatepass")
                    + b"\n"
                )
    except ArrowException as error:
        raise DataError(f"this Parquet file cannot be read: {error}", file=path) from None


def check_lines(source: Path, path: Path, spans: Sequence[Sequence[int]]) -> None:
    """Raise one error for a file that is not JSONL at all, instead of one for each line.

    Args:
        source: the plain file.
        path: the annotation file, for the message.
        spans: start and end of the first lines.

    Raises:
        DataError: the file is a JSON array, has objects over several lines, or no line is valid JSON.
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
            "this is a JSON array, not one record per line; name it .json (or .json.gz)", file=path
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
            f"none of the first {len(lines)} lines is valid JSON (the file begins {first!r}); it must have "
            "one JSON object per line",
            file=path,
        )


def _starts_array(text: str, lines: Sequence[bytes], num_lines: int) -> bool:
    """Return whether a JSON array of objects starts here, rather than a bad record that is a list."""
    if not re.match(r"\[\s*\{", text):
        return False
    return not _is_json(lines[0]) or num_lines == 1


def _is_json(line: bytes) -> bool:
    """Return whether a line is valid JSON, as far as it was read."""
    if len(line) == _MAX_OBJECT:
        return True
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _describe_object(value: dict[str, Any], rest: str) -> str:
    """Return a message about an object over several lines, at the start of a JSONL file."""
    if value and all(isinstance(entry, dict) and "annotation" in entry for entry in value.values()):
        return "this is a meta file, not a file of records"
    if not rest:
        return "this is one JSON object over several lines; write one record per line, or an array (.json)"
    return (
        "the records are indented over several lines; write one per line (jq -c . FILE), or put them into an "
        "array in a .json file (jq -s . FILE)"
    )
