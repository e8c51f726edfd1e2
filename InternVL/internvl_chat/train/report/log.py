"""Warnings and errors in `training_log.txt`."""

import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from internvl_chat.utils.files import is_file

_LINE = re.compile(r"(\d\d:\d\d:\d\d) (DEBUG|INFO|WARNING|ERROR|CRITICAL) (.*)")
_TRACEBACK = "Traceback (most recent call last):"
# Lines kept of a long message.
_MAX_LINES = 20
_LAST_LINES = 25


@dataclass
class LogMessage:
    """Messages that differ only in numbers.

    Attributes:
        severity: `warning` or `error`.
        time: time of day of the last one; empty if unknown.
        text: the last one.
        count: number of messages.
    """

    severity: str
    time: str
    text: str
    count: int = 1


def read_log(file: Path) -> tuple[list[LogMessage], list[str]]:
    """Return the warnings and errors of a log in the order of their first occurrence, and its last lines."""
    if not is_file(file):
        return [], []
    found: dict[tuple[str, str], LogMessage] = {}
    end: deque[str] = deque(maxlen=_LAST_LINES)

    def lines() -> Iterator[str]:
        with file.open(encoding="utf-8", errors="replace") as stream:
            for line in stream:
                end.append(line.rstrip())
                yield end[-1]

    for message in _messages(lines()):
        key = message.severity, re.sub(r"\d+", "0", message.text)
        if key in found:
            message.count += found[key].count
        found[key] = message
    return list(found.values()), list(end)


def _messages(lines: Iterable[str]) -> Iterator[LogMessage]:
    """Yield warnings, errors and the exceptions of tracebacks; indented lines continue a message."""
    message: LogMessage | None = None
    size, in_traceback = 0, False
    for line in lines:
        match = _LINE.match(line)
        if match is None and line[:1].isspace():
            if message is not None and size < _MAX_LINES:
                message.text += f"\n{line}"
                size += 1
            continue
        if message is not None:
            yield message
        message, size = None, 1
        if match and match[2] not in ("DEBUG", "INFO"):
            message = LogMessage("warning" if match[2] == "WARNING" else "error", match[1], match[3])
        elif match is None and in_traceback:
            message = LogMessage("error", "", line)
        in_traceback = line == _TRACEBACK
    if message is not None:
        yield message
