"""Plot the losses of a run (training, datasets, validation) and its learning rate."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from internvl_chat.train.monitor.loss_curves import (
    FEW_STEPS,
    Curve,
    Row,
    loss_limits,
    read_steps,
)
from internvl_chat.utils.logging import get_logger
from internvl_chat.utils.plotting import (
    BLUE,
    LIGHT_BLUE,
    ORANGE,
    TEXT_GRAY,
    new_figure,
    plain_text,
    save_png,
    series_style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = get_logger(__name__)

_SKIPPED_COLOR = "#B00020"
_SUBTITLE_WIDTH = 130


def plot_loss(metrics: Path, output: Path, validation: Path | None = None, *, subtitle: str = "") -> None:
    """Write the loss plot of a run as a PNG file (see `loss_figure`).

    Args:
        metrics: path to `metrics.jsonl`; without any steps, no file is written.
        output: PNG file to write; the name of its folder is the title of the plot.
        validation: path to `validation.jsonl`; the file may be missing.
        subtitle: model and recipe of the run.
    """
    rows, eval_losses = read_steps(metrics), read_steps(validation) if validation else []
    if not rows:
        return
    try:
        figure = loss_figure(rows, eval_losses, title=output.parent.name, subtitle=subtitle)
    except ImportError:
        logger.warning("%s: not written, because matplotlib is not installed", output)
        return
    save_png(figure, output)


def loss_figure(
    rows: Sequence[Row], validation: Sequence[Row], *, title: str, subtitle: str = ""
) -> "Figure":
    """Return a figure with the loss, the loss by dataset (with multiple datasets), and the learning rate.

    Spikes (see `loss_limits`) are marked at the edge of the axes and excluded from the mean.

    Args:
        rows: rows of `metrics.jsonl`, sorted by step.
        validation: rows of `validation.jsonl`, sorted by step.
        title: name of the run.
        subtitle: model and recipe of the run; the number of steps is prepended.
    """
    names = sorted({name for row in rows for name in row.get("sets", ())})
    heights = [3.2, max(2.2, 0.19 * len(names)), 1.1] if len(names) > 1 else [3.2, 1.1]
    figure = new_figure(10, sum(heights) + 1.2)
    panels = figure.subplots(len(heights), sharex=True, height_ratios=heights)
    _draw_loss(panels[0], rows, validation)
    if len(names) > 1:
        _draw_datasets(panels[1], names, rows, validation)
    _draw_learning_rate(panels[-1], rows)
    steps = [row["step"] for row in (*rows, *validation)]
    _format_steps(panels[-1], min(steps), max(steps))
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1.03), frameon=False, fontsize="small")
    _draw_title(panels[0], title, f"{rows[-1]['step']:,} step{'s' * (rows[-1]['step'] > 1)}", subtitle)
    return figure


def _draw_title(axes: "Axes", title: str, steps: str, subtitle: str) -> None:
    lines = textwrap.wrap(" · ".join(filter(None, (steps, subtitle))), _SUBTITLE_WIDTH)
    axes.set_title(plain_text(title, 80), loc="left", fontweight="bold", pad=10 + 13 * len(lines))
    axes.annotate(
        plain_text("\n".join(lines), 400), (0, 1), (0, 7), xycoords="axes fraction", fontsize="small",
        textcoords="offset points", color=TEXT_GRAY, va="bottom",
    )  # fmt: skip


def _draw_loss(axes: "Axes", rows: Sequence[Row], validation: Sequence[Row]) -> None:
    """Draw the loss of each step, its mean, the validation losses, skipped steps and spikes."""
    curve = Curve.from_points((row["step"], _used(row, row["loss"]), row.get("records", 1)) for row in rows)
    eval_losses = Curve.from_points((row["step"], row["loss"], 1) for row in validation)
    limits = loss_limits(curve.losses, eval_losses.losses)
    is_short = not curve.half_width
    style = {"color": BLUE, "marker": "o"} if is_short else {"color": LIGHT_BLUE, "alpha": 0.6}
    axes.plot(curve.steps, curve.losses, linewidth=0.8, markersize=4, label="loss of a step", **style)
    if not is_short:
        mean = curve.mean(limits)
        label = f"mean of {2 * curve.half_width + 1:,} steps{_at_the_end(mean)}"
        axes.plot(curve.steps, mean, color=BLUE, linewidth=2, label=label)
    if len(eval_losses.steps):
        label = f"validation{_at_the_end(eval_losses.losses)}"
        axes.plot(*eval_losses[:2], "o-", color=ORANGE, linewidth=1.5, markersize=4, label=label)
    marked = [
        ("skipped", "x", 0, _SKIPPED_COLOR, ~np.isfinite(curve.losses)),
        ("above the axis", "^", 1, BLUE, curve.losses > limits[1]),
        ("below the axis", "v", 0, BLUE, curve.losses < limits[0]),
    ]
    for name, marker, side, color, chosen in marked:
        if chosen.any():
            # With this transform, y = 0 is the lower edge of the axes and y = 1 the upper edge.
            steps = curve.steps[chosen]
            axes.plot(
                steps, np.full(len(steps), side), marker=marker, color=color, linestyle="none", clip_on=False,
                label=f"{name} ({len(steps):,})", transform=axes.get_xaxis_transform(),
            )  # fmt: skip
    axes.set(ylabel="loss", ylim=limits)


def _draw_datasets(
    axes: "Axes", names: Sequence[str], rows: Sequence[Row], validation: Sequence[Row]
) -> None:
    """Draw the mean loss of each dataset as a line and its validation losses as circles."""
    means, eval_losses = [np.zeros(0)], [np.zeros(0)]
    for number, name in enumerate(names):
        parts = [(row, row["sets"][name]) for row in rows if name in row.get("sets", ())]
        curve = Curve.from_points((r["step"], _used(r, part["loss"]), part["records"]) for r, part in parts)
        # A dataset has few records per step, so its mean covers more steps.
        means.append(curve.mean(loss_limits(curve.losses, np.zeros(0)), factor=2))
        style = series_style(number)
        axes.plot(
            curve.steps, means[-1], linewidth=1.4, marker=None if curve.half_width else ".",
            label=plain_text(name, 28), **style,
        )  # fmt: skip
        known = [row for row in validation if name in row.get("sets", ())]
        points = Curve.from_points((row["step"], row["sets"][name]["loss"], 1) for row in known)
        if len(points.steps):
            eval_losses.append(points.losses)
            axes.plot(*points[:2], "o", color=style["color"], markersize=4, markerfacecolor="white")
    if len(eval_losses) > 1:
        axes.plot([], [], "o", color=TEXT_GRAY, markersize=4, markerfacecolor="white", label="validation")
    axes.set(ylabel="loss by dataset", ylim=loss_limits(np.concatenate(means), np.concatenate(eval_losses)))


def _used(row: Row, loss: float | None) -> float | None:
    """Return `loss`, or None if the row belongs to a skipped step."""
    return None if "skipped_because" in row else loss


def _at_the_end(losses: np.ndarray) -> str:
    known = losses[np.isfinite(losses)]
    return f": {known[-1]:.3f} at the end" if len(known) else ""


def _draw_learning_rate(axes: "Axes", rows: Sequence[Row]) -> None:
    known = [(row["step"], row["learning_rate"]) for row in rows if row.get("learning_rate") is not None]
    if known:
        marker = "o" if len(known) < FEW_STEPS else None
        axes.plot(*zip(*known, strict=True), color=TEXT_GRAY, linewidth=1.2, marker=marker, markersize=3)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
        axes.locator_params(axis="y", nbins=3)
    axes.set(ylabel="learning rate", ylim=(0, 1.1 * max((rate for _, rate in known), default=0) or 1))


def _format_steps(axes: "Axes", first: int, last: int) -> None:
    """Format the step axis, which all panels share."""
    from matplotlib.ticker import MaxNLocator

    margin = max(0.5, 0.01 * (last - first))
    axes.set(xlabel="optimizer step", xlim=(first - margin, last + margin))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")
