"""Output of the subcommands: text, JSON lines, tables and a progress bar."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def print_json(row: dict[str, Any]) -> None:
    """Print a JSON object on one line."""
    echo(json.dumps(row, ensure_ascii=False))


def echo(text: str = "", *, end: str = "\n", stream: TextIO | None = None) -> None:
    """Print text to a stream (default: standard output) and flush it."""
    print(text, end=end, flush=True, file=stream)


def progress(items: Iterable[T], total: int | None = None, unit: str = "record") -> Iterable[T]:
    """Wrap items in a progress bar on stderr, which appears after two seconds and only on a terminal."""
    return tqdm(items, total=total, unit=unit, delay=2, file=sys.stderr, dynamic_ncols=True, disable=None)


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table; columns of numbers (`-` if missing) are right-aligned, all others left-aligned."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [all(_is_number(row[i]) for row in rows) for i in range(len(header))]
    for row in cells:
        aligned = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)]
        echo("  ".join(aligned).rstrip())


def _is_number(cell: Any) -> bool:
    text = str(cell).strip("%").replace(".", "", 1).replace(",", "")
    return isinstance(cell, int | float) or text == "-" or text.isdigit()
