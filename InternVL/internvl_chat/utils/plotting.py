"""Shared by all plots: colors that color-blind readers can tell apart, figures, PNG files.

Matplotlib is imported only when something is plotted.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito (2008), without the yellow that is invisible on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
BLUE, ORANGE, GREEN, PINK, LIGHT_BLUE, AMBER = PALETTE
GRAY = "#8C939C"
TEXT_GRAY = "#555555"


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure, in inches, that leaves the backend and the figures of pyplot alone."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_png(figure: "Figure", file: Path) -> None:
    """Write a figure as a PNG."""
    figure.savefig(file, dpi=130, facecolor="white")


def plain_text(text: str, max_length: int = 40) -> str:
    """Truncate a text and escape dollars, which matplotlib reads as math."""
    short = text if len(text) <= max_length else f"{text[: max_length - 1]}…"
    return short.replace("$", r"\$")


def series_style(number: int) -> dict[str, Any]:
    """Return color and line style of a series; each repetition of the colors has another line style."""
    styles = ("-", "--", ":", "-.")
    return {
        "color": PALETTE[number % len(PALETTE)],
        "linestyle": styles[number // len(PALETTE) % len(styles)],
    }
