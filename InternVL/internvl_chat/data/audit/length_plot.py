"""Histograms of record lengths per dataset."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from internvl_chat.data.audit.checks import Audit
from internvl_chat.utils.plotting import AMBER, BLUE, GREEN, new_figure, plain_text, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABELS = {"tokens": "tokens", "supervised": "supervised tokens", "tiles": "tiles"}
_COLORS = {"tokens": BLUE, "supervised": GREEN, "tiles": AMBER}
_LIMIT_COLOR = "#B00020"
_BINS = 60
_MAX_NAME = 28


def plot_lengths(audit: Audit, file: Path) -> None:
    """Save the plot of the lengths as a PNG file; see `length_figure`."""
    save_png(length_figure(audit), file)


def length_figure(audit: Audit) -> "Figure":
    """Return histograms of tokens, supervised tokens and tiles, with one row per dataset.

    The panels of a column share their x axis, which is logarithmic for tokens. Each panel has its own y axis,
    so that a tall peak in one dataset does not flatten the others.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    names = list(_LABELS) if audit.max_seq_length is not None else ["tiles"]
    rows = max(1, len(audit.sets))
    figure = new_figure(1.8 + 3.6 * len(names), 0.9 + 1.15 * rows)
    panels = figure.subplots(rows, len(names), sharex="col", squeeze=False)
    for position, name in enumerate(names):
        columns = [getattr(findings.lengths, name) for findings in audit.sets]
        limit = audit.max_seq_length if name == "tokens" else None
        bins = _bins(columns, limit, logarithmic=name != "tiles")
        for column, axes in zip(columns, panels[:, position], strict=False):
            _draw(axes, column, bins, _COLORS[name], limit)
        if name != "tiles":
            panels[0, position].set_xscale("log")
            # Use denser ticks if the axis spans less than a decade.
            subs = (1, 2, 3, 4, 5, 6, 8) if bins[-1] < 10 * bins[0] else (1, 2, 5)
            panels[-1, position].xaxis.set_major_locator(LogLocator(subs=subs))
            panels[-1, position].xaxis.set_minor_locator(NullLocator())
            panels[-1, position].xaxis.set_major_formatter("{x:,.0f}")
        else:
            panels[-1, position].xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        panels[-1, position].set(xlabel=f"{_LABELS[name]} per record", xlim=(bins[0], bins[-1]))
    for findings, axes in zip(audit.sets, panels[:, 0], strict=False):
        axes.set_ylabel(plain_text(findings.spec.name, _MAX_NAME), rotation=0, ha="right", va="center")
    if audit.max_seq_length is not None:
        legend = f"line: max_seq_length {audit.max_seq_length:,}"
        panels[0, 0].set_title(legend, loc="left", fontsize="small", color=_LIMIT_COLOR, pad=2)
    figure.align_ylabels(panels[:, 0])
    figure.suptitle("Number of records by length", fontsize="medium", fontweight="bold")
    return figure


def _bins(columns: Sequence[np.ndarray], limit: int | None, *, logarithmic: bool) -> np.ndarray:
    """Return bin edges for all panels of a column.

    Args:
        columns: values of each dataset, non-negative integers.
        limit: value that the bins must include, if any.
        logarithmic: space the edges logarithmically; they still lie halfway between integers.
    """
    filled = [column for column in columns if len(column)]
    largest = max((int(column.max()) for column in filled), default=1)
    if not logarithmic:
        step = max(1, -(-largest // _BINS))
        return np.arange(-0.5, largest + step, step)
    smallest = max(1, min((int(column.min()) for column in filled), default=1))
    top = max(largest, limit * 1.2 if limit else 0)
    # At the lower end, multiple edges may fall between the same two integers.
    edges = np.unique(np.geomspace(smallest, top + 1, _BINS).astype(int)) - 0.5
    return np.append(edges, top + 1.5)


def _draw(axes: "Axes", column: np.ndarray, bins: np.ndarray, color: str, limit: int | None) -> None:
    """Draw a histogram with its median and a line at the limit."""
    axes.hist(column, bins=bins.tolist(), color=color, alpha=0.85)
    if len(column):
        axes.set_title(f"median {int(np.median(column)):,}", loc="right", fontsize="small", pad=2)
    if limit is not None:
        axes.axvline(limit, color=_LIMIT_COLOR, linewidth=1.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(axis="y", nbins=3, integer=True)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.25)
