"""Files of records, read one at a time by byte offset, so that memory does not grow with their size."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from internvl_chat.utils.errors import DataError

_CHUNK = 1 << 24
_BOM = b"\xef\xbb\xbf"
# A line shorter than this may be blank and is looked at; a record never is that short.
_BLANK_BELOW = 16
# What one record may cost: bytes, and lists and objects, of which Python's own take 30 times the bytes.
_LONGEST_RECORD = 1 << 26
_MOST_PARTS = 200_000
# A JSON array is read as a whole.
_LARGEST_ARRAY = 1 << 31


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
        """Return the bytes of a record.

        Raises:
            DataError: they are more than any record has.
        """
        start, end = int(self._starts[index]), int(self._ends[index])
        if end - start > _LONGEST_RECORD:
            raise self._error(
                index, f"{end - start:,} bytes, more than the {_LONGEST_RECORD:,} of one record",
                "line too long",
            )  # fmt: skip
        return os.pread(self._open(), end - start, start)

    def _error(self, index: int, message: str, kind: str) -> DataError:
        return DataError(message, file=self.path, line=self.line(index), kind=kind)

    def _open(self) -> int:
        """Return a descriptor of this process's own."""
        if self._descriptor is None or self._descriptor[0] != os.getpid():
            self._descriptor = (os.getpid(), os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
        return self._descriptor[1]

    def __getitem__(self, index: int) -> Any:
        """Parse a record.

        Raises:
            DataError: it is not JSON in UTF-8, or too large.
        """
        content, kind = self.read(index), "json"
        if content.count(b"[") + content.count(b"{") > _MOST_PARTS:
            raise self._error(index, f"more than {_MOST_PARTS:,} lists and objects", "structure")
        try:
            return json.loads(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            message, kind = f"not UTF-8 at byte {error.start}", "encoding"
        except json.JSONDecodeError as error:
            message = f"not valid JSON: {error.msg} (character {error.pos + 1})"
            if not content.strip():
                message = "a line of nothing but white space; delete it"
        except ValueError:
            message = "not valid JSON: a number has too many digits"
        except RecursionError:
            message = "JSON is nested too deeply"
        raise self._error(index, message, kind)


Spans = tuple[np.ndarray, np.ndarray, np.ndarray]


def _line_spans(path: Path) -> Spans:
    """Return where each non-blank line begins and ends, and its number."""
    starts, ends, numbers = [], [], []
    with path.open("rb") as stream:
        position = len(_BOM) if stream.read(len(_BOM)) == _BOM else 0
        stream.seek(position)
        begin, lines = position, 0
        while chunk := stream.read(_CHUNK):
            newlines = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + position
            position += len(chunk)
            if len(newlines):
                begins = np.concatenate([[begin], newlines[:-1] + 1]).astype(np.int64)
                filled = newlines > begins
                starts.append(begins[filled])
                ends.append(newlines[filled])
                numbers.append(np.flatnonzero(filled) + lines + 1)
                begin, lines = int(newlines[-1]) + 1, lines + len(newlines)
        if position > begin:
            starts.append(np.array([begin]))
            ends.append(np.array([position]))
            numbers.append(np.array([lines + 1]))
        spans = [np.concatenate([np.zeros(0, np.int64), *arrays]) for arrays in (starts, ends, numbers)]
        keep = np.ones(len(spans[0]), bool)
        for i in np.flatnonzero(spans[1] - spans[0] < _BLANK_BELOW):
            stream.seek(spans[0][i])
            keep[i] = bool(stream.read(spans[1][i] - spans[0][i]).strip())
    return spans[0][keep], spans[1][keep], spans[2][keep]


def _array_spans(path: Path) -> Spans:
    """Return where each element of a JSON array begins and ends, and the line where it begins.

    JSON's structure is ASCII, so that decoding as Latin-1 makes characters and bytes the same.
    """
    if path.stat().st_size > _LARGEST_ARRAY:
        raise DataError("too large for a JSON array; use .jsonl, one record a line", file=path)
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
            raise DataError(
                f"not valid JSON: {error.msg}", file=path, line=error.lineno, kind="json"
            ) from None
        except ValueError:
            message = "not valid JSON: a number has too many digits"
            raise DataError(message, file=path, line=line, kind="json") from None
        except RecursionError:
            raise DataError("JSON is nested too deeply", file=path, line=line, kind="json") from None
        starts.append(position)
        ends.append(end)
        lines.append(line)
        position = _skip_space(text, end)
        if text.startswith("]", position):
            break
        if not text.startswith(",", position):
            message = "not valid JSON: expecting ',' or ']' after this record"
            raise DataError(message, file=path, line=line, kind="json")
        position = _skip_space(text, position + 1)
    if text[position + 1 :].strip():
        line = text.count("\n", 0, position) + 1
        message = "not valid JSON: something follows the array of records"
        raise DataError(message, file=path, line=line, kind="json")
    return np.array(starts, np.int64), np.array(ends, np.int64), np.array(lines, np.int64)


def _skip_space(text: str, position: int) -> int:
    """Return the first position from `position` on that is not white space."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
