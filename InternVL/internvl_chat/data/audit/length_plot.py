"""A picture of how long the records of each data set are."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from internvl_chat.data.audit.checks import Audit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABELS = {"tokens": "tokens", "supervised": "supervised tokens", "tiles": "tiles"}
_COLOURS = {"tokens": "#3b6ea5", "supervised": "#4f8f5b", "tiles": "#a5763b"}
_LIMIT_COLOUR = "#a11"
_BINS = 60
_LONGEST_NAME = 28


def plot_lengths(audit: Audit, picture: Path) -> None:
    """Draw how tokens, supervised tokens and tiles are distributed, as a PNG: a row for each data set.

    Panels above each other share their x axis, logarithmic for tokens; each has a y axis of its own, so that
    a set whose records are all alike flattens no other.

    Args:
        audit: the findings.
        picture: the file, which is replaced.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    names = list(_LABELS) if audit.max_seq_length is not None else ["tiles"]
    rows = max(1, len(audit.sets))
    figure, panels = plt.subplots(
        rows, len(names), figsize=(1.8 + 3.6 * len(names), 0.9 + 1.15 * rows), sharex="col", squeeze=False,
        constrained_layout=True,
    )  # fmt: skip
    for place, name in enumerate(names):
        columns = [getattr(one.lengths, name) for one in audit.sets]
        limit = audit.max_seq_length if name == "tokens" else None
        bins = _bins(columns, limit, logarithmic=name != "tiles")
        for column, axes in zip(columns, panels[:, place], strict=False):
            _draw(axes, column, bins, _COLOURS[name], limit)
        if name != "tiles":
            panels[0, place].set_xscale("log")
            panels[-1, place].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panels[-1, place].xaxis.set_minor_locator(NullLocator())
            panels[-1, place].xaxis.set_major_formatter("{x:,.0f}")
        panels[-1, place].set(xlabel=f"{_LABELS[name]} of a record", xlim=(bins[0], bins[-1]))
    for one, axes in zip(audit.sets, panels[:, 0], strict=False):
        axes.set_ylabel(_shown(one.spec.name), rotation=0, ha="right", va="center")
    if audit.max_seq_length is not None:
        limit = f"line: max_seq_length {audit.max_seq_length:,}"
        panels[0, 0].set_title(limit, loc="left", fontsize="small", color=_LIMIT_COLOUR, pad=2)
    figure.align_ylabels(panels[:, 0])
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def _bins(columns: Sequence[np.ndarray], limit: int | None, *, logarithmic: bool) -> np.ndarray:
    """Return the bounds of the bars that all panels of a column share; a limit is well inside of them.

    Args:
        columns: numbers, none below 0.
        limit: a number to be shown, if there is one.
        logarithmic: bounds of whole numbers, each about the same factor above the one before.
    """
    filled = [column for column in columns if len(column)]
    most = max((int(column.max()) for column in filled), default=1)
    if not logarithmic:
        # A bar for each number, as long as they can be told apart.
        step = max(1, -(-most // _BINS))
        return np.arange(-0.5, most + step, step)
    least = max(1, min((int(column.min()) for column in filled), default=1))
    top = max(most, limit * 1.2 if limit else 0)
    # Few tokens are whole numbers far apart: several bounds would lie between two of them.
    bounds = np.unique(np.geomspace(least, top + 1, _BINS).astype(int)) - 0.5
    return np.append(bounds, top + 1.5)


def _draw(axes: "Axes", column: np.ndarray, bins: np.ndarray, colour: str, limit: int | None) -> None:
    """Draw one distribution with its median, and a line at the limit."""
    axes.hist(column, bins=bins, color=colour, alpha=0.85)
    if len(column):
        axes.set_title(f"median {int(np.median(column)):,}", loc="right", fontsize="small", pad=2)
    if limit is not None:
        axes.axvline(limit, color=_LIMIT_COLOUR, linewidth=1.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(axis="y", nbins=3, integer=True)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.25)


def _shown(name: str) -> str:
    """Return a name of bounded length in which nothing begins a formula."""
    short = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
    return short.replace("$", r"\$")
