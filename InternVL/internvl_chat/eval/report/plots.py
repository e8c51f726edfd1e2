"""Evaluation plots: a bar chart with a panel per task, and a radar chart of all tasks.

For PMC-MI-Bench, both include the published results.
"""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from internvl_chat.eval.report.published import CHOICE, OPEN, PUBLISHED, TITLES, published
from internvl_chat.eval.report.table import LABELS, Metrics, is_choice
from internvl_chat.utils.plotting import AMBER, BLUE, GRAY, TEXT_GRAY, new_figure, plain_text, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = {"InternVL3-8B": GRAY, "M3LLM-8B": AMBER}
_MODEL_COLOR = BLUE
# Metrics of open tasks in the bar chart; the table contains all metrics.
_BARS = ("bleu1", "bleu4", "rougeL", "f1", "bertscore", "sts")
_COLUMNS = 2
# Heights in inches: of a bar, and of a panel's title and axis together.
_BAR, _PANEL = 0.18, 0.8
# Gap between metrics, in units of a bar.
_GAP = 0.7


def radar_axes(tasks: Mapping[str, Metrics], benchmark: str) -> list[tuple[str, str]]:
    """Return the axes of the radar chart as (task, metric) pairs.

    For PMC-MI-Bench, there is an axis for each computed metric with a published value. For other benchmarks,
    there is one axis per task, for accuracy or ROUGE-L.
    """
    if benchmark == "pmc-mi":
        pairs = [(task, name) for task in TITLES for name in (CHOICE if task == "multi-choice" else OPEN)]
        pairs = [(task, name) for task, name in pairs if published("M3LLM-8B", task, name) is not None]
    else:
        pairs = [(task, "accuracy" if is_choice(metrics) else "rougeL") for task, metrics in tasks.items()]
    return [(task, name) for task, name in pairs if task in tasks and tasks[task].get(name) is not None]


def plot_radar(tasks: Mapping[str, Metrics], picture: Path, *, benchmark: str, model: str) -> bool:
    """Save the radar chart as a PNG file; return False without saving it if it has fewer than three axes."""
    figure = radar_figure(tasks, benchmark=benchmark, model=model)
    if figure is None:
        return False
    save_png(figure, picture)
    return True


def plot_bars(tasks: Mapping[str, Metrics], picture: Path, *, benchmark: str, model: str) -> None:
    """Save the bar chart as a PNG file."""
    save_png(bar_figure(tasks, benchmark=benchmark, model=model), picture)


def radar_figure(tasks: Mapping[str, Metrics], *, benchmark: str, model: str) -> "Figure | None":
    """Return the radar chart, or None if it would have fewer than three axes."""
    pairs = radar_axes(tasks, benchmark)
    if len(pairs) < 3:
        return None
    lines = {}
    if benchmark == "pmc-mi":
        lines = {
            f"{other} (published)": (_COLORS[other], [published(other, *pair) or 0.0 for pair in pairs])
            for other in PUBLISHED
        }
    lines[plain_text(model)] = (_MODEL_COLOR, [tasks[task][name] or 0.0 for task, name in pairs])
    angles = np.linspace(0, 2 * np.pi, len(pairs), endpoint=False)
    figure = new_figure(10, 9)
    # Constrained layout would not leave room for the labels.
    figure.set_layout_engine("none")
    axes: Any = figure.add_axes((0.19, 0.13, 0.62, 0.7), projection="polar")
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    for label, (color, values) in lines.items():
        closed = ([*angles, angles[0]], [*values, values[0]])
        is_model = color == _MODEL_COLOR
        # matplotlib drops labels that start with "_" from the legend; the space prevents that.
        axes.plot(*closed, color=color, linewidth=2.2 if is_model else 1.6, label=f" {label}")
        axes.fill(*closed, color=color, alpha=0.15 if is_model else 0.06)
    axes.set(ylim=(0, 100), xticks=angles)
    axes.set_xticklabels([])
    axes.set_yticks(
        [20, 40, 60, 80, 100], ["20", "40", "60", "80", "100"], fontsize="x-small", color=TEXT_GRAY
    )
    axes.set_rlabel_position(np.degrees(angles[1]) / 2)
    axes.grid(alpha=0.4)
    axes.spines["polar"].set_alpha(0.4)
    for angle, (task, name) in zip(angles, pairs, strict=True):
        side, height = np.sin(angle), np.cos(angle)
        aligned = "center" if abs(side) < 0.1 else "left" if side > 0 else "right"
        vertical = "bottom" if height > 0.9 else "top" if height < -0.9 else "center"
        title = textwrap.fill(plain_text(_title(task, benchmark)), 24)
        size = 8.5 if len(pairs) <= 20 else 6
        axes.text(angle, 104, f"{title}\n{LABELS[name]}", ha=aligned, va=vertical, fontsize=size)
    figure.legend(loc="lower center", bbox_to_anchor=(0.5, 0.02), ncols=3, frameon=False)
    figure.suptitle(f"{plain_text(benchmark)}, in percent", fontweight="bold", y=0.96)
    return figure


def bar_figure(tasks: Mapping[str, Metrics], *, benchmark: str, model: str) -> "Figure":
    """Return the bar chart, with one panel per task; each metric has a bar for each model."""
    series = {task: _task_bars(task, metrics, benchmark) for task, metrics in tasks.items()}
    columns = min(_COLUMNS, len(tasks))
    rows = [list(tasks)[start : start + columns] for start in range(0, len(tasks), columns)]
    # Axis length of each row of panels, in units of a bar.
    lengths = [
        max(sum(len(bars) + _GAP for bars in series[task].values()) or 2 for task in row) for row in rows
    ]
    heights = [_BAR * length + _PANEL for length in lengths]
    figure = new_figure(5.6 * columns + 0.4, sum(heights) + 0.9)
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.1)
    panels = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    drawn: dict[str, Any] = {}
    for row, length, row_panels in zip(rows, lengths, panels, strict=True):
        for axes in row_panels[len(row) :]:
            axes.remove()
        for task, axes in zip(row, row_panels, strict=False):
            drawn |= _draw_task(axes, series[task], length)
            items = tasks[task]["items"]
            title = plain_text(_title(task, benchmark), 48)
            axes.set_title(
                f"{title} ({items:,} item{'s' if items != 1 else ''})", loc="left", fontsize="medium"
            )
    name = plain_text(model)
    title = f"{plain_text(benchmark)}: {name}, in percent"
    if len(drawn) < 2:
        figure.suptitle(title, fontweight="bold")
        return figure
    names = [f"{other} (published)" for other in PUBLISHED if other in drawn]
    bars = [drawn[other] for other in (*PUBLISHED, "") if other in drawn]
    # Use the legend title as figure title: a legend outside the panels would cover a suptitle.
    figure.legend(
        bars, [*names, f" {name}"], loc="outside upper center", ncols=3, frameon=False, title=title,
        title_fontproperties={"weight": "bold", "size": "large"},
    )  # fmt: skip
    return figure


def _task_bars(task: str, metrics: Metrics, benchmark: str) -> dict[str, dict[str, float]]:
    """Return the values of the bars: metric -> model -> value. The key of the evaluated model is ""."""
    names = [n for n in (CHOICE if is_choice(metrics) else _BARS) if metrics.get(n) is not None]
    bars: dict[str, dict[str, float]] = {}
    for name in names:
        others = {other: published(other, task, name) for other in PUBLISHED if benchmark == "pmc-mi"}
        bars[name] = {other: value for other, value in others.items() if value is not None}
        bars[name][""] = metrics[name] or 0.0
    return bars


def _draw_task(axes: "Axes", metrics: Mapping[str, Mapping[str, float]], length: float) -> dict[str, Any]:
    """Draw the bars of a task from the top down; return the bar containers for the legend, keyed by model.

    `length` is the length of the axis in units of a bar.
    """
    y, ticks, drawn = 0.0, [], {}
    for name, values in metrics.items():
        ticks.append((y + (len(values) - 1) / 2, LABELS[name]))
        for model, value in values.items():
            color = _COLORS.get(model, _MODEL_COLOR)
            drawn[model] = axes.barh(y, value, height=0.9, color=color)
            # Labels of large values extend beyond the axis; the layout leaves room for them.
            axes.text(value + 1, y, f"{value:.1f}", va="center", fontsize="x-small")
            y += 1
        y += _GAP
    if not metrics:
        axes.text(50, 0.5, "no metrics computed", ha="center", va="center", color=TEXT_GRAY)
    axes.set_yticks([middle for middle, _ in ticks], [label for _, label in ticks])
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0, 100), ylim=(length - _GAP - 0.4, -0.6))
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


def _title(task: str, benchmark: str) -> str:
    return TITLES.get(task, task) if benchmark == "pmc-mi" else task
