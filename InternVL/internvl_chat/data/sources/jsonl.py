"""Random access to records in JSONL files and JSON arrays by byte offset, with constant memory per record."""

import json
import os
import re
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from internvl_chat.data.sources.annotation_files import check_lines, open_source
from internvl_chat.utils.errors import DataError

_CHUNK = 1 << 24
_BOM = b"\xef\xbb\xbf"
# Shorter lines cannot contain a record; they are dropped if they are blank.
_MAX_BLANK_BYTES = 16
# Limits per record. Python lists and dictionaries take about 30 times the size of their JSON.
_MAX_RECORD_BYTES = 1 << 26
_MAX_CONTAINERS = 200_000
# JSON arrays are read into memory in full.
_MAX_ARRAY_BYTES = 1 << 31


class RecordFile:
    """Raw records of a JSONL, JSON array (`.json`) or Parquet file; the first two may be gzip-compressed.

    Args:
        path: the file, which is indexed immediately and opened separately in each process.

    Raises:
        DataError: the file cannot be read, has an unsupported format, or contains no records.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # (N, 3) int64: start offset, end offset and line number of each record.
            self._source, is_array = open_source(path)
            self._spans = _array_spans(self._source, path) if is_array else _line_spans(self._source)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", file=path) from None
        if not len(self._spans):
            raise DataError("contains no records", file=path)
        if not is_array:
            check_lines(self._source, path, self._spans[:32, :2].tolist())
        self._descriptor: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self._spans)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def line(self, index: int) -> int:
        """Return the 1-based line number at which a record begins."""
        return int(self._spans[index, 2])

    def read(self, index: int) -> bytes:
        """Return the bytes of a record.

        Raises:
            DataError: the record exceeds the size limit.
        """
        start, end, _ = self._spans[index].tolist()
        if end - start > _MAX_RECORD_BYTES:
            message = f"the record has {end - start:,} bytes, more than the limit of {_MAX_RECORD_BYTES:,}"
            raise self._error(index, message, "line too long")
        return os.pread(self._open(), end - start, start)

    def search(self, pattern: re.Pattern[bytes], *, lower: bool = False) -> list[int]:
        """Return the indices of the records that contain a match, without parsing them.

        Records that exceed the size limit are not searched.

        Args:
            pattern: searched within each record; literal patterns are fastest.
            lower: search the records with their ASCII letters in lowercase.
        """
        starts, ends = self._spans[:, 0].tolist(), self._spans[:, 1].tolist()
        found: list[int] = []
        first = 0
        while first < len(starts):
            offset = starts[first]
            last = max(first + 1, bisect_right(ends, offset + _CHUNK))
            if ends[last - 1] - offset <= max(_CHUNK, _MAX_RECORD_BYTES):
                block = os.pread(self._open(), ends[last - 1] - offset, offset)
                block, position = block.lower() if lower else block, 0
                while match := pattern.search(block, position):
                    index = bisect_right(starts, offset + match.start()) - 1
                    inside = offset + match.end() <= ends[index]
                    found += [index] * inside
                    position = ends[index] - offset if inside else match.start() + 1
            first = last
        return found

    def _error(self, index: int, message: str, kind: str) -> DataError:
        return DataError(message, file=self.path, line=self.line(index), kind=kind)

    def _open(self) -> int:
        """Return a file descriptor opened by this process; it is closed when this object is deleted."""
        if self._descriptor is None or self._descriptor[0] != os.getpid():
            descriptor = os.open(self._source, os.O_RDONLY | os.O_CLOEXEC)
            self._descriptor = (os.getpid(), descriptor)
            weakref.finalize(self, os.close, descriptor)
        return self._descriptor[1]

    def __getitem__(self, index: int) -> Any:
        """Parse a record.

        Raises:
            DataError: the record is not valid UTF-8 JSON, or is too large.
        """
        content, kind = self.read(index), "json"
        if content.count(b"[") + content.count(b"{") > _MAX_CONTAINERS:
            message = f"the record has more than {_MAX_CONTAINERS:,} lists and objects"
            raise self._error(index, message, "structure")
        try:
            return json.loads(content.decode("utf-8"), object_pairs_hook=unique_keys)
        except UnicodeDecodeError as error:
            message, kind = f"not UTF-8 at byte {error.start}", "encoding"
        except (ValueError, RecursionError) as error:
            message = describe_json_error(error)
            if isinstance(error, json.JSONDecodeError):
                message += f" (character {error.pos + 1})"
                if not content.strip():
                    message = "the line contains only whitespace; delete it"
        raise self._error(index, message, kind)


class DuplicateKeyError(ValueError):
    """A JSON object contains a key twice; Python's parser would keep only the last value."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Convert the pairs of a JSON object to a dictionary; use as `object_pairs_hook`.

    Raises:
        DuplicateKeyError: a key occurs twice.
    """
    result = dict(pairs)
    if len(result) < len(pairs):
        duplicates = (key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise DuplicateKeyError(f"duplicate key {min(duplicates)!r:.80}")
    return result


def describe_json_error(error: ValueError | RecursionError) -> str:
    """Return a user-facing message for a JSON parser error."""
    if isinstance(error, DuplicateKeyError):
        return str(error)
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg}"
    if isinstance(error, RecursionError):
        return "JSON is nested too deeply"
    return "not valid JSON: a number has too many digits"


def _line_spans(path: Path) -> np.ndarray:
    """Return the spans of all non-blank lines."""
    parts = [np.zeros((0, 3), np.int64)]
    with path.open("rb") as stream:
        position = len(_BOM) if stream.read(len(_BOM)) == _BOM else 0
        stream.seek(position)
        start, lines = position, 0
        while chunk := stream.read(_CHUNK):
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + position
            position += len(chunk)
            if len(ends):
                starts = np.concatenate([[start], ends[:-1] + 1])
                filled = np.flatnonzero(ends > starts)
                parts.append(np.stack([starts[filled], ends[filled], filled + lines + 1], axis=1))
                start, lines = int(ends[-1]) + 1, lines + len(ends)
        if position > start:
            parts.append(np.array([[start, position, lines + 1]]))
        spans = np.concatenate(parts)
        keep = np.ones(len(spans), bool)
        for i in np.flatnonzero(spans[:, 1] - spans[:, 0] < _MAX_BLANK_BYTES):
            stream.seek(spans[i, 0])
            keep[i] = bool(stream.read(spans[i, 1] - spans[i, 0]).strip())
    return spans[keep]


def _array_spans(source: Path, path: Path) -> np.ndarray:
    """Return the spans of all elements of a JSON array.

    The text is decoded as Latin-1, so that character offsets are byte offsets; JSON syntax is ASCII.

    Args:
        source: uncompressed file.
        path: annotation file, for error messages.
    """
    if (size := source.stat().st_size) > _MAX_ARRAY_BYTES:
        message = f"has {size:,} bytes, more than the limit of {_MAX_ARRAY_BYTES:,} for a JSON array"
        raise DataError(f"{message}; use .jsonl with one record per line", file=path)
    text = source.read_bytes().decode("latin-1").replace(_BOM.decode("latin-1"), "   ", 1)
    position = len(text) - len(text.lstrip())
    if not text.startswith("[", position):
        message = "a .json file must contain an array of records; use .jsonl for one record per line"
        raise DataError(message, file=path)
    decoder = json.JSONDecoder()
    spans: list[tuple[int, int, int]] = []
    line, counted = 1, 0
    position = _skip_space(text, position + 1)
    while not (text.startswith("]", position) and not spans):
        line, counted = line + text.count("\n", counted, position), position
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", line)
            raise DataError(describe_json_error(error), file=path, line=line, kind="json") from None
        spans.append((position, end, line))
        position = _skip_space(text, end)
        if text.startswith("]", position):
            break
        if not text.startswith(",", position):
            message = "not valid JSON: expecting ',' or ']' after this record"
            raise DataError(message, file=path, line=line, kind="json")
        position = _skip_space(text, position + 1)
    if text[position + 1 :].strip():
        line = text.count("\n", 0, position) + 1
        message = "not valid JSON: unexpected content after the array of records"
        raise DataError(message, file=path, line=line, kind="json")
    return np.array(spans, np.int64).reshape(-1, 3)


def _skip_space(text: str, position: int) -> int:
    """Return the position of the next non-whitespace character."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
