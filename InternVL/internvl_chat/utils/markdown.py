"""Markdown tables."""

from collections.abc import Iterable, Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]], *, left: int | None = None) -> str:
    """Return a Markdown table with escaped cells.

    Args:
        left: number of left-aligned columns (default: all); the remaining ones are right-aligned.
    """
    left = len(header) if left is None else left
    rule = [":--"] * left + ["--:"] * (len(header) - left)
    lines = [header, rule, *([_escape(str(cell)) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")
