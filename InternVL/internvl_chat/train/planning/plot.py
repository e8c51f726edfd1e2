"""Plot of a plan: time and cost against GPUs, records, tokens, tiles and model size."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from internvl_chat.train.planning.estimate import Estimate, Planner
from internvl_chat.train.planning.sweep import (
    IDLE,
    Series,
    describe_limits,
    sweep_gpus,
    sweep_models,
    sweep_records,
    sweep_tiles,
    sweep_tokens,
)
from internvl_chat.utils.plotting import (
    AMBER,
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    PINK,
    TEXT_GRAY,
    new_figure,
    plain_text,
    save_png,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLES = ("-", "--", ":")
# Marker color for each limit on the speed.
_LIMITS = {"compute": GREEN, "communication": ORANGE, "optimizer": PINK, "overhead": AMBER, IDLE: GRAY}
_SWEEPS: dict[str, Callable[[Planner, Estimate], Series]] = {
    "records per epoch": sweep_records,
    "tokens per record": sweep_tokens,
    "tiles per record": sweep_tiles,
    "billion parameters": sweep_models,
}


def save_plot(
    planner: Planner, title: str, batch_size: int, per_node: int, best: Estimate | None, file: Path
) -> list[str]:
    """Save the plot as a PNG file; return a line per curve with the limits on the speed.

    Args:
        planner: model, records and hardware.
        title: title of the plot.
        batch_size: records per step.
        per_node: GPUs per node.
        best: recommended mode, whose ranks and batch size are used in all panels except those with GPUs on
            the x axis; None if nothing fits.
        file: PNG file.
    """
    gpus, sweeps = [], {}
    with tqdm(
        desc="plot", total=3 + len(_SWEEPS), delay=2, file=sys.stderr, dynamic_ncols=True, disable=None
    ) as bar:
        for series in sweep_gpus(planner, batch_size, per_node):
            gpus.append(series)
            bar.update()
        for quantity, sweep in _SWEEPS.items() if best else ():
            assert best is not None
            sweeps[quantity] = sweep(planner, best)
            bar.update()
    name = planner.hardware.name if best is None else f"{best.ranks} x {planner.hardware.name}"
    _save(gpus, sweeps, planner.hardware.price, title, name, file)
    limits = [describe_limits(series, "GPUs") for series in gpus]
    return limits + [describe_limits(series, quantity) for quantity, series in sweeps.items()]


def _save(
    gpus: Sequence[Series], sweeps: dict[str, Series], price: float | None, title: str, name: str, file: Path
) -> None:
    """Draw all panels and save the figure."""
    from matplotlib.lines import Line2D

    figure = new_figure(13, 7.4)
    panels = figure.subplots(2, 3)
    _draw(panels[0, 0], gpus, "GPUs", "hours per epoch", [[point.hours for point in s.points] for s in gpus])
    panels[0, 0].legend(fontsize="small", frameon=False)
    cost = "GPU hours per epoch" if price is None else "cost per epoch"
    _draw(panels[0, 1], gpus, "GPUs", cost, _costs(gpus, price))
    for axes in [panels[0, 2], *panels[1]][len(sweeps) :]:
        axes.set_visible(False)
    for (quantity, series), axes in zip(sweeps.items(), [panels[0, 2], *panels[1]], strict=False):
        values = _costs([series], price)
        _draw(axes, [series], quantity, cost, values)
        for label, point, y in zip(series.names, series.points, values[0], strict=False):
            is_first = point is series.points[0]
            offset, side = ((-2, 7), "left") if is_first else ((-7, 4), "right")
            axes.annotate(label, (point.x, y), offset, textcoords="offset points", fontsize="small", ha=side)
        axes.set_title(name, loc="right", fontsize="small", color=TEXT_GRAY)
    handles = [
        Line2D([], [], marker="o", ls="", color=color, label=limit) for limit, color in _LIMITS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False,
                  title="marker: what limits the speed")  # fmt: skip
    figure.suptitle(plain_text(title, 200), fontsize="medium", fontweight="bold")
    save_png(figure, file)


def _costs(series: Sequence[Series], price: float | None) -> list[list[float]]:
    factor = 1.0 if price is None else price
    return [[point.device_hours * factor for point in line.points] for line in series]


def _draw(
    axes: "Axes", series: Sequence[Series], xlabel: str, ylabel: str, values: Sequence[Sequence[float]]
) -> None:
    """Draw lines on logarithmic axes; marker colors show the limit on the speed."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for line, ys, style in zip(series, values, _STYLES, strict=False):
        xs = [point.x for point in line.points]
        axes.plot(xs, ys, style, color=BLUE, linewidth=1.3, zorder=1, label=line.label)
        axes.scatter(xs, ys, c=[_LIMITS[point.limit] for point in line.points], s=28, zorder=2)
    # Tiles may be 0.
    axes.set(xscale="linear" if "tiles" in xlabel else "log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    for axis, numbers in ((axes.xaxis, [p.x for line in series for p in line.points]),
                          (axes.yaxis, [y for ys in values for y in ys])):  # fmt: skip
        if axis.get_scale() == "log" and numbers:
            # Use denser ticks if the axis spans at most two decades.
            wide = max(numbers) > 100 * min(numbers)
            axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
            axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(lambda value, _: f"{value:,.12g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
