"""What all commands print with: JSON lines for programs, tables and a progress bar for people."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def emit(row: dict[str, Any]) -> None:
    """Print one JSON object as a line."""
    print(json.dumps(row, ensure_ascii=False), flush=True)  # noqa: T201


def say(text: str = "") -> None:
    """Print a line for people."""
    print(text, flush=True)  # noqa: T201


def write(text: str, stream: TextIO | None = None) -> None:
    """Print text as it is, without a line's end, on standard output or another stream."""
    print(text, end="", flush=True, file=stream)


def progress(items: Iterable[T], total: int | None = None, unit: str = "record") -> Iterable[T]:
    """Show a progress bar on standard error once two seconds have passed."""
    return tqdm(items, total=total, unit=unit, delay=2, file=sys.stderr, dynamic_ncols=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under a header, text to the left and numbers to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [all(_is_number(row[i]) for row in rows) for i in range(len(header))]
    for row in cells:
        aligned = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)]
        say("  ".join(aligned).rstrip())


def _is_number(cell: Any) -> bool:
    return (
        isinstance(cell, int | float) or str(cell).strip("%").replace(".", "", 1).replace(",", "").isdigit()
    )
