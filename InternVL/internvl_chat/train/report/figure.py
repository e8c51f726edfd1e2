"""Plotly figures with curves over optimizer steps, in JSON."""

import html
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from internvl_chat.train.monitor.loss_curves import FEW_STEPS
from internvl_chat.utils.plotting import PALETTE, series_style

NEUTRAL = "#3B434D"
# Color of a curve on a light page -> color on a dark page.
COLORS = dict(
    zip(
        (*PALETTE, NEUTRAL),
        ("#58ACEB", "#F2884B", "#2DC79A", "#E3A2C8", "#9AD4F7", "#F4BC50", "#DCE2E9"),
        strict=True,
    )
)
MAX_POINTS = 2000
_DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
# With more curves, a box with all their values would cover the chart.
_MAX_HOVERED = 12


@dataclass(frozen=True)
class Chart:
    """A chart with its heading and note.

    Attributes:
        key: identifier on the page.
        title: heading.
        note: explanation below the heading.
        figure: JSON of a Plotly figure; the page sets the colors of axes and text.
        wide: whether the chart spans all columns of the page.
    """

    key: str
    title: str
    note: str
    figure: str
    wide: bool


def downsample(values: np.ndarray, points: int = MAX_POINTS) -> np.ndarray:
    """Return ascending indices of about `points` values that keep the shape of a curve and its extremes.

    These are the first and the last value, and the smallest and largest one of each of `points / 2` equal
    parts. NaN must have been removed.

    >>> downsample(np.array([0, 1, 9, 1, 0, 0, -5, 0]), 4).tolist()
    [0, 2, 4, 6, 7]
    """
    if len(values) <= points:
        return np.arange(len(values))
    bounds = np.linspace(0, len(values), points // 2 + 1).astype(int)
    parts = [(start, values[start:stop]) for start, stop in itertools.pairwise(bounds)]
    chosen = {start + int(function(part)) for start, part in parts for function in (np.argmin, np.argmax)}
    return np.array(sorted(chosen | {0, len(values) - 1}))


def curve_style(number: int) -> dict[str, Any]:
    """Return the color and dash of a curve, as options of `curve`."""
    style = series_style(number)
    return {"color": style["color"], "dash": _DASHES[style["linestyle"]]}


def curve(
    steps: np.ndarray,
    values: np.ndarray,
    name: str,
    *,
    color: str,
    dash: str = "solid",
    width: float = 2.0,
    dots: bool = False,
    digits: str = ".4f",
) -> Iterator[go.Scatter]:
    """Yield a downsampled curve without NaN; nothing if no value is finite.

    Args:
        steps: (N,) steps in ascending order.
        values: (N,) values.
        name: name in the legend.
        color: one of `COLORS`.
        dash: Plotly's dash style.
        width: width of the line.
        dots: mark each value.
        digits: format of the values.
    """
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    if len(values):
        chosen = downsample(values)
        yield go.Scatter(
            x=steps[chosen].astype(float), y=values[chosen].astype(np.float32), name=_label(name),
            mode="lines+markers" if dots else "lines", line={"color": color, "dash": dash, "width": width},
            marker={"size": 6}, hovertemplate=f"%{{y:{digits}}}",
        )  # fmt: skip


def _label(name: str) -> str:
    """Shorten a name in the middle, and escape the markup that Plotly would apply."""
    return html.escape(name if len(name) <= 40 else f"{name[:24]}…{name[-15:]}", quote=False)


def faint(traces: Iterator[go.Scatter], *, legend: bool) -> Iterator[go.Scatter]:
    """Yield curves as thin background lines without values in the hover box."""
    for trace in traces:
        yield trace.update(
            line={"width": 1}, opacity=0.35, hoverinfo="skip", hovertemplate=None, showlegend=legend
        )


def marks(
    steps: np.ndarray, values: np.ndarray, y: float, name: str, *, symbol: str, color: str, legend: bool
) -> Iterator[go.Scatter]:
    """Yield a marker at height `y` for each step, with its value in the hover box; nothing without steps."""
    if not len(steps):
        return
    texts = [name if np.isnan(value) else f"{name}: {value:.4g}" for value in values[:MAX_POINTS]]
    shown = steps[:MAX_POINTS].astype(float)
    yield go.Scatter(
        x=shown, y=np.full(len(shown), y), mode="markers", name=f"{name} ({len(steps):,})",
        text=texts, hovertemplate="%{text}<extra></extra>", cliponaxis=False, showlegend=legend,
        marker={"symbol": symbol, "size": 9, "color": color},
    )  # fmt: skip


def make_chart(
    key: str,
    title: str,
    note: str,
    traces: Sequence[go.Scatter],
    *,
    limits: tuple[float, float] | None = None,
    ticks: str | None = None,
    legend: bool = True,
    wide: bool = False,
    dotted: Sequence[int] = (),
) -> Chart | None:
    """Return a chart; None without curves.

    Args:
        key: see `Chart`.
        title: see `Chart`.
        note: see `Chart`.
        traces: the curves.
        limits: limits of the y axis; None for those of the curves.
        ticks: format of the tick labels of the y axis.
        legend: show a legend.
        wide: see `Chart`.
        dotted: steps after which to draw a vertical dotted line.
    """
    if not traces:
        return None
    first, last = min(trace.x.min() for trace in traces), max(trace.x.max() for trace in traces)
    margin = max(0.5, 0.01 * (last - first))
    line = {"type": "line", "y0": 0, "y1": 1, "yref": "paper", "layer": "below",
            "line": {"dash": "dot", "width": 1, "color": NEUTRAL}}  # fmt: skip
    layout = go.Layout(
        template="none",
        margin={"l": 56, "r": 14, "t": 10, "b": 44},
        hovermode="x unified" if len(traces) <= _MAX_HOVERED else "closest",
        showlegend=legend,
        legend={"orientation": "h", "y": -0.16 if wide else -0.22, "yanchor": "top", "x": 0},
        xaxis={
            "title": {"text": "optimizer step", "standoff": 6},
            "range": [float(first - margin), float(last + margin)],
            "tickformat": ",d",
            "dtick": 1 if last - first < FEW_STEPS else None,
            "zeroline": False,
        },
        yaxis={"range": limits, "zeroline": False, "automargin": True, "tickformat": ticks},
        shapes=[line | {"x0": step + 0.5, "x1": step + 0.5} for step in dotted],
    )
    return Chart(key, title, note, go.Figure(list(traces), layout).to_json(), wide)
