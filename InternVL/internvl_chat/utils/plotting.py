"""Plotting helpers: a colorblind-safe palette, figures and PNG files.

Matplotlib is imported only when a plot is drawn.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito (2008), without yellow, which is hard to see on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
BLUE, ORANGE, GREEN, PINK, LIGHT_BLUE, AMBER = PALETTE
GRAY = "#8C939C"
TEXT_GRAY = "#555555"


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure (size in inches) that does not depend on pyplot's backend and global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_png(figure: "Figure", file: Path) -> None:
    """Save a figure as a PNG file with a white background."""
    figure.savefig(file, dpi=130, facecolor="white")


def plain_text(text: str, max_length: int = 40) -> str:
    """Truncate text and escape dollar signs, which matplotlib would parse as math."""
    short = text if len(text) <= max_length else f"{text[: max_length - 1]}…"
    return short.replace("$", r"\$")


def series_style(number: int) -> dict[str, Any]:
    """Return the color and line style of a series; when colors repeat, the line style differs."""
    styles = ("-", "--", ":", "-.")
    return {
        "color": PALETTE[number % len(PALETTE)],
        "linestyle": styles[number // len(PALETTE) % len(styles)],
    }
