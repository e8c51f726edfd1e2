"""Plots of an evaluation: a radar chart with the published results, and a bar chart of every task."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from internvl_chat.eval.report.published import CHOICE, OPEN, PUBLISHED, TITLES, published
from internvl_chat.eval.report.table import LABELS, Metrics, is_choice

_COLOURS = {"InternVL3-8B": "#9aa5b1", "M3LLM-8B": "#e08e2b"}
_MODEL_COLOUR = "#1f5a96"
# Metrics of open tasks in the bar chart; the table has all of them.
_BARS = ("bleu1", "bleu4", "rougeL", "f1", "bertscore", "sts")


def radar_axes(tasks: Mapping[str, Metrics], benchmark: str) -> list[tuple[str, str]]:
    """Return the axes of the radar chart as pairs of task and metric.

    PMC-MI-Bench has the published metrics that were computed; any other benchmark has accuracy or ROUGE-L of
    each task.
    """
    if benchmark == "pmc-mi":
        pairs = [(task, name) for task in TITLES for name in (CHOICE if task == "multi-choice" else OPEN)]
        pairs = [(task, name) for task, name in pairs if published("M3LLM-8B", task, name) is not None]
    else:
        pairs = [(task, "accuracy" if is_choice(metrics) else "rougeL") for task, metrics in tasks.items()]
    return [(task, name) for task, name in pairs if task in tasks and tasks[task].get(name) is not None]


def plot_radar(tasks: Mapping[str, Metrics], picture: Path, *, benchmark: str, model: str) -> bool:
    """Plot the radar chart as a PNG; returns False if there are fewer than three axes."""
    pairs = radar_axes(tasks, benchmark)
    if len(pairs) < 3:
        return False
    lines = {model: (_MODEL_COLOUR, [float(tasks[task][name]) for task, name in pairs])}
    if benchmark == "pmc-mi":
        lines |= {
            other: (_COLOURS[other], [published(other, task, name) or 0.0 for task, name in pairs])
            for other in PUBLISHED
        }
    plt = _pyplot()
    angles = np.linspace(0, 2 * np.pi, len(pairs), endpoint=False)
    figure = plt.figure(figsize=(9, 8))
    axes = figure.add_axes((0.2, 0.14, 0.6, 0.7), projection="polar")
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    for label, (colour, values) in lines.items():
        closed = ([*angles, angles[0]], [*values, values[0]])
        is_model = colour == _MODEL_COLOUR
        # The space keeps names that start with "_" in the legend.
        axes.plot(*closed, color=colour, linewidth=2 if is_model else 1.2, label=f" {_plain(label)}")
        axes.fill(*closed, color=colour, alpha=0.12 if is_model else 0.04)
    axes.set(ylim=(0, 100), xticks=angles)
    axes.set_xticklabels([])
    axes.set_yticks([20, 40, 60, 80], ["20", "40", "60", "80"], fontsize="x-small", color="#777")
    for angle, (task, name) in zip(angles, pairs, strict=True):
        side = np.sin(angle)
        aligned = "center" if abs(side) < 0.1 else "left" if side > 0 else "right"
        title = _plain(TITLES.get(task, task) if benchmark == "pmc-mi" else task)
        axes.text(angle, 106, f"{title}\n{LABELS[name]}", ha=aligned, va="center", fontsize=8)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False)
    figure.suptitle(f"{_plain(benchmark)}, in percent", y=0.97)
    _save(plt, figure, picture)
    return True


def plot_bars(tasks: Mapping[str, Metrics], picture: Path, *, benchmark: str, model: str) -> None:
    """Plot the main metrics of every task as a PNG, open tasks above multiple choice."""
    groups = [
        ({task: metrics for task, metrics in tasks.items() if is_choice(metrics) == choice}, names)
        for names, choice in ((_BARS, False), (CHOICE, True))
    ]
    groups = [(chosen, names) for chosen, names in groups if chosen]
    # In inches: the same thickness for all bars, plus axis and legend.
    heights = [0.24 * sum(len(_known(m, names)) + 1 for m in chosen.values()) + 1 for chosen, names in groups]
    plt = _pyplot()
    figure = plt.figure(figsize=(8, sum(heights) + 0.5), layout="constrained")
    parts = figure.subfigures(len(groups), squeeze=False, height_ratios=heights)[:, 0]
    for part, (chosen, names) in zip(parts, groups, strict=True):
        _draw_bars(part, chosen, names, plt.get_cmap("viridis"))
    figure.suptitle(f"{_plain(benchmark)}: {_plain(model)}")
    _save(plt, figure, picture)


def _draw_bars(part: object, tasks: Mapping[str, Metrics], names: tuple[str, ...], colours: object) -> None:
    """Draw horizontal bars, which leave room for long task names."""
    axes = part.subplots()
    y, ticks = 0, []
    in_legend: set[str] = set()
    for task, metrics in tasks.items():
        known = _known(metrics, names)
        for offset, name in enumerate(known):
            label = None if name in in_legend else LABELS[name]
            colour = colours(0.1 + 0.8 * names.index(name) / len(names))
            axes.barh(y + offset, metrics[name], height=0.9, color=colour, label=label)
            axes.text(metrics[name] + 1, y + offset, f"{metrics[name]:.1f}", va="center", fontsize=7)
            in_legend.add(name)
        ticks.append((y + (len(known) - 1) / 2, _plain(task)))
        y += len(known) + 1
    axes.set_yticks([middle for middle, _ in ticks], [name for _, name in ticks])
    axes.set(xlim=(0, 112), ylim=(y - 0.5, -1), xlabel="percent")
    axes.spines[["top", "right"]].set_visible(False)
    if in_legend:
        part.legend(loc="outside lower center", ncols=6, frameon=False, fontsize="small")


def _known(metrics: Metrics, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if metrics.get(name) is not None]


def _plain(text: str) -> str:
    """Truncate a name and escape dollars, which matplotlib reads as math."""
    return text.replace("$", r"\$")[:40]


def _pyplot() -> object:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(plt: object, figure: object, picture: Path) -> None:
    figure.savefig(picture, dpi=120)
    plt.close(figure)
