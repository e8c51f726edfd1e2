"""File utilities: atomic writes, JSON and JSON Lines, SHA-256, and a file check that never raises."""

import contextlib
import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from internvl_chat.utils.errors import UsageError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)


@contextlib.contextmanager
def atomic_path(file: Path) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to `file` if the block succeeds and deleted otherwise."""
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def write_json(file: Path, value: Any) -> None:
    """Write indented UTF-8 JSON atomically."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(file) as partial:
        partial.write_bytes(_encode(text))


def write_json_lines(file: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value per line, atomically and synced to disk."""
    with atomic_path(file) as partial, partial.open("wb") as stream:
        for row in rows:
            stream.write(_encode_line(row))
        stream.flush()
        os.fsync(stream.fileno())


def append_json_line(stream: IO[bytes], row: Any) -> None:
    """Append a JSON value as one line to an open file and sync the file to disk."""
    stream.write(_encode_line(row))
    stream.flush()
    os.fsync(stream.fileno())


def open_for_appending(file: Path) -> IO[bytes]:
    """Open a JSON Lines file for appending, lock it, and remove an incomplete last line.

    Raises:
        UsageError: another process has locked the file.
    """
    stream = file.open("ab")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        raise UsageError(f"{file}: another process is writing to it; wait for it or stop it") from None
    content = file.read_bytes()
    os.truncate(file, content.rfind(b"\n") + 1)
    return stream


def _encode_line(row: Any) -> bytes:
    return _encode(json.dumps(row, ensure_ascii=False) + "\n")


def _encode(text: str) -> bytes:
    # Lone surrogates, which stand for bytes of non-UTF-8 file names, become JSON escapes.
    return text.encode("utf-8", "backslashreplace")


def read_json_lines(file: Path, *, containing: bytes = b"") -> Iterator[dict[str, Any] | None]:
    """Yield the object on each line of a JSON Lines file, or None if the line is damaged.

    Empty lines are skipped; a missing file has no lines.

    Args:
        file: the file.
        containing: skip lines that do not contain these bytes.
    """
    if not is_file(file):
        return
    with file.open("rb") as stream:
        for line in stream:
            if containing not in line or line.isspace():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            yield value if isinstance(value, dict) else None


def is_file(path: Path) -> bool:
    """Return whether a path is a file; False if the path is invalid or inaccessible."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def sha256(content: bytes) -> str:
    """Return the SHA-256 of bytes in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class JsonLinesFile:
    """Appends complete lines to a JSON Lines file.

    If a write fails, for example because the disk is full, the line is kept and written with the next one.

    Args:
        path: the file; created when the first line is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: list[bytes] = []
        self._warned = False

    def append(self, row: dict[str, Any]) -> None:
        """Write a new line and all pending ones; if the write fails, they stay pending."""
        self._pending.append(_encode_line(row))
        self._write_pending()

    def flush(self) -> None:
        """Write pending lines and sync the file to disk."""
        if self._pending:
            self._write_pending()
        with contextlib.suppress(OSError), self.path.open("rb") as stream:
            os.fsync(stream.fileno())

    def _write_pending(self) -> None:
        size = None
        try:
            with self.path.open("ab") as stream:
                size = stream.tell()
                stream.write(b"".join(self._pending))
        except OSError as error:
            if size is not None:
                self._truncate(size)
            if not self._warned:
                self._warned = True
                message = "%s: cannot be written (%s); new lines are kept in memory until a write succeeds"
                logger.warning(message, self.path, error.strerror)
            return
        self._pending.clear()
        self._warned = False

    def _truncate(self, size: int) -> None:
        """Remove a partially written line."""
        try:
            with self.path.open("r+b") as stream:
                stream.truncate(size)
        except OSError as error:
            logger.warning("%s: may end with an incomplete line (%s)", self.path, error.strerror)
