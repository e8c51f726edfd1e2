"""Plot of a plan: time and cost against GPUs, records, tokens, tiles and model size."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_chat.train.planning.estimate import Planner, recommend
from internvl_chat.train.planning.sweep import (
    IDLE,
    Point,
    Series,
    sweep_gpus,
    sweep_models,
    sweep_records,
    sweep_tiles,
    sweep_tokens,
)
from internvl_chat.utils.plotting import (
    AMBER, BLUE, GRAY, GREEN, ORANGE, PINK, TEXT_GRAY, new_figure, plain_text, save_png,
)  # fmt: skip

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLES = ("-", "--", ":")
# Color of a marker by what limits the speed.
_LIMITS = {
    "compute": GREEN,
    "communication": ORANGE,
    "optimizer": PINK,
    "overhead": AMBER,
    IDLE: GRAY,
}


def save_plot(planner: Planner, title: str, batch_size: int, per_node: int, ranks: int, file: Path) -> None:
    """Save the plot as a PNG file.

    Args:
        planner: model, records and hardware.
        title: title of the plot.
        batch_size: records per step.
        per_node: GPUs per node.
        ranks: number of ranks for all panels except those with GPUs on the x axis.
        file: PNG file.
    """
    from matplotlib.lines import Line2D

    gpus = list(sweep_gpus(planner, batch_size, per_node))
    best = recommend(planner.compare(ranks, max(1, ranks // per_node), batch_size))
    figure = new_figure(13, 7.4)
    panels = figure.subplots(2, 3)
    price = planner.hardware.price
    _draw(panels[0, 0], gpus, "GPUs", "hours per epoch", [[p.hours for p in s.points] for s in gpus])
    panels[0, 0].legend(fontsize="small", frameon=False)
    _draw(panels[0, 1], gpus, "GPUs", _cost_label(price), _costs(gpus, price))
    if best is not None:
        sweeps = (
            ("records per epoch", sweep_records(best)),
            ("tokens per record", sweep_tokens(planner, best)),
            ("tiles per record", sweep_tiles(planner, best)),
            ("parameters (billion)", sweep_models(planner, best)),
        )
        for (label, series), axes in zip(sweeps, [panels[0, 2], *panels[1]], strict=True):
            _draw(axes, [series], label, _cost_label(price), _costs([series], price))
            if label == "tiles per record":
                axes.set_xscale("linear")
            for name, point in zip(series.label.split(), series.points, strict=False):
                y = point.device_hours * (price or 1)
                axes.annotate(name, (point.x, y), (5, -11), textcoords="offset points", fontsize="small")
            axes.set_title(f"{best.ranks} x {planner.hardware.name}", loc="right", fontsize="small", color=TEXT_GRAY)
    handles = [Line2D([], [], marker="o", ls="", color=color, label=name) for name, color in _LIMITS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False,
                  title="marker: what limits the speed")  # fmt: skip
    figure.suptitle(plain_text(title, 200), fontsize="medium", fontweight="bold")
    save_png(figure, file)


def _cost_label(price: float | None) -> str:
    return "GPU hours per epoch" if price is None else "cost per epoch"


def _costs(series: Sequence[Series], price: float | None) -> list[list[float]]:
    return [[point.device_hours * (price or 1) for point in s.points] for s in series]


def _draw(axes: "Axes", series: Sequence[Series], xlabel: str, ylabel: str, values: list[list[float]]) -> None:
    """Draw lines on logarithmic axes; the color of a marker is what limits the speed there."""
    for number, (line, ys) in enumerate(zip(series, values, strict=True)):
        xs = [point.x for point in line.points]
        axes.plot(xs, ys, _STYLES[number], color=BLUE, linewidth=1.3, zorder=1, label=line.label)
        axes.scatter(xs, ys, c=[_LIMITS[_name(point)] for point in line.points], s=28, zorder=2)
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _name(point: Point) -> str:
    return point.limit
