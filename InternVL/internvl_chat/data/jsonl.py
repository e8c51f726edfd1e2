"""Files of records, read one at a time by byte offset, so that memory does not grow with their size."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from internvl_chat.errors import DataError

_CHUNK = 1 << 24
_BOM = b"\xef\xbb\xbf"
# A line shorter than this may be blank and is looked at; a record never is that short.
_BLANK_BELOW = 16


class RecordFile:
    """The raw records of a JSONL file, or of a JSON array (`.json`).

    Args:
        path: the file; it is indexed at once, and opened by each process that reads from it.

    Raises:
        DataError: the file cannot be read, or holds no record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            spans = _array_spans(path) if path.suffix == ".json" else _line_spans(path)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", file=path) from None
        self._starts, self._ends, self._lines = spans
        if not len(self._starts):
            raise DataError("holds no record", file=path)
        self._descriptor: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self._starts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def line(self, index: int) -> int:
        """Return the line, from 1, where a record begins."""
        return int(self._lines[index])

    def read(self, index: int) -> bytes:
        """Return the bytes of a record."""
        start, end = int(self._starts[index]), int(self._ends[index])
        return os.pread(self._open(), end - start, start)

    def _open(self) -> int:
        """Return a descriptor of this process's own."""
        if self._descriptor is None or self._descriptor[0] != os.getpid():
            self._descriptor = (os.getpid(), os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
        return self._descriptor[1]

    def __getitem__(self, index: int) -> Any:
        """Parse a record.

        Raises:
            DataError: it is not JSON in UTF-8.
        """
        try:
            return json.loads(self.read(index).decode("utf-8"))
        except UnicodeDecodeError as error:
            message = f"not UTF-8 at byte {error.start}"
        except json.JSONDecodeError as error:
            message = f"not valid JSON: {error.msg} (character {error.pos + 1})"
            if not self.read(index).strip():
                message = "a line of nothing but white space; delete it"
        except RecursionError:
            message = "JSON is nested too deeply"
        raise DataError(message, file=self.path, line=self.line(index))


Spans = tuple[np.ndarray, np.ndarray, np.ndarray]


def _line_spans(path: Path) -> Spans:
    """Return where each non-blank line begins and ends, and its number."""
    newlines = [np.zeros(0, np.int64)]
    with path.open("rb") as stream:
        position = len(_BOM) if stream.read(len(_BOM)) == _BOM else 0
        first = position
        stream.seek(position)
        while chunk := stream.read(_CHUNK):
            newlines.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + position)
            position += len(chunk)
        ends = np.concatenate(newlines)
        if not len(ends) or ends[-1] != position - 1:
            ends = np.append(ends, position)
        starts = np.concatenate([[first], ends[:-1] + 1]).astype(np.int64)
        keep = np.ones(len(ends), bool)
        for i in np.flatnonzero(ends - starts < _BLANK_BELOW):
            stream.seek(starts[i])
            keep[i] = bool(stream.read(ends[i] - starts[i]).strip())
    return starts[keep], ends[keep], np.flatnonzero(keep) + 1


def _array_spans(path: Path) -> Spans:
    """Return where each element of a JSON array begins and ends, and the line where it begins.

    JSON's structure is ASCII, so that decoding as Latin-1 makes characters and bytes the same.
    """
    text = path.read_bytes().decode("latin-1").replace("\xef\xbb\xbf", "   ", 1)
    position = len(text) - len(text.lstrip())
    if not text.startswith("[", position):
        raise DataError(
            "a .json file must hold an array of records; use .jsonl for one record a line", file=path
        )
    decoder = json.JSONDecoder()
    starts, ends, lines = [], [], []
    position = _skip_space(text, position + 1)
    while not (text.startswith("]", position) and not starts):
        counted, known = (starts[-1], lines[-1]) if starts else (0, 1)
        line = known + text.count("\n", counted, position)
        try:
            _, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"not valid JSON: {error.msg}", file=path, line=error.lineno) from None
        except RecursionError:
            raise DataError("JSON is nested too deeply", file=path, line=line) from None
        starts.append(position)
        ends.append(end)
        lines.append(line)
        position = _skip_space(text, end)
        if text.startswith("]", position):
            break
        if not text.startswith(",", position):
            raise DataError("not valid JSON: expecting ',' or ']' after this record", file=path, line=line)
        position = _skip_space(text, position + 1)
    if text[position + 1 :].strip():
        line = text.count("\n", 0, position) + 1
        raise DataError("not valid JSON: something follows the array of records", file=path, line=line)
    return np.array(starts, np.int64), np.array(ends, np.int64), np.array(lines, np.int64)


def _skip_space(text: str, position: int) -> int:
    """Return the first position from `position` on that is not white space."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
