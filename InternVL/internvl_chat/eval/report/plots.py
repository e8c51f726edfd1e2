"""Pictures of an evaluation: a radar beside the published figures, and bars of every task."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from internvl_chat.eval.report.published import CHOICE, OPEN, PUBLISHED, TITLES, published
from internvl_chat.eval.report.table import LABELS, Figures, is_choice

_COLOURS = {"InternVL3-8B": "#9aa5b1", "M3LLM-8B": "#e08e2b"}
_OWN = "#1f5a96"
# What a bar chart shows of a task; the rest is in the table.
_BARS = ("bleu1", "bleu4", "rougeL", "f1", "bertscore", "sts")


def radar_axes(tasks: Mapping[str, Figures], benchmark: str) -> list[tuple[str, str]]:
    """Return the axes of the radar: task and metric.

    Of PMC-MI-Bench those that the paper has and that were computed; else one a task, accuracy or ROUGE-L.
    """
    if benchmark == "pmc-mi":
        pairs = [(task, name) for task in TITLES for name in (CHOICE if task == "multi-choice" else OPEN)]
        pairs = [(task, name) for task, name in pairs if published("M3LLM-8B", task, name) is not None]
    else:
        pairs = [(task, "accuracy" if is_choice(figures) else "rougeL") for task, figures in tasks.items()]
    return [(task, name) for task, name in pairs if task in tasks and tasks[task].get(name) is not None]


def plot_radar(tasks: Mapping[str, Figures], picture: Path, *, benchmark: str, model: str) -> bool:
    """Draw the radar as a PNG; returns whether there was anything to draw (three axes at least)."""
    pairs = radar_axes(tasks, benchmark)
    if len(pairs) < 3:
        return False
    lines = {model: (_OWN, [float(tasks[task][name]) for task, name in pairs])}
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
        # A name that begins with "_" would be left out of the legend.
        axes.plot(*closed, color=colour, linewidth=2 if colour == _OWN else 1.2, label=f" {_plain(label)}")
        axes.fill(*closed, color=colour, alpha=0.12 if colour == _OWN else 0.04)
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


def plot_bars(tasks: Mapping[str, Figures], picture: Path, *, benchmark: str, model: str) -> None:
    """Draw the main figures of every task as a PNG, open tasks above multiple choice."""
    groups = [
        ({task: f for task, f in tasks.items() if is_choice(f) == wanted}, names)
        for names, wanted in ((_BARS, False), (CHOICE, True))
    ]
    groups = [(chosen, names) for chosen, names in groups if chosen]
    # In inches: bars of one thickness, and room for axis and legend.
    heights = [0.24 * sum(len(_known(f, names)) + 1 for f in chosen.values()) + 1 for chosen, names in groups]
    plt = _pyplot()
    figure = plt.figure(figsize=(8, sum(heights) + 0.5), layout="constrained")
    parts = figure.subfigures(len(groups), squeeze=False, height_ratios=heights)[:, 0]
    for part, (chosen, names) in zip(parts, groups, strict=True):
        _draw_bars(part, chosen, names, plt.get_cmap("viridis"))
    figure.suptitle(f"{_plain(benchmark)}: {_plain(model)}")
    _save(plt, figure, picture)


def _draw_bars(part: object, tasks: Mapping[str, Figures], names: tuple[str, ...], colours: object) -> None:
    """Draw horizontal bars, so that no name has to be turned or cut."""
    axes = part.subplots()
    place, ticks = 0, []
    drawn: set[str] = set()
    for task, figures in tasks.items():
        known = _known(figures, names)
        for offset, name in enumerate(known):
            label = None if name in drawn else LABELS[name]
            colour = colours(0.1 + 0.8 * names.index(name) / len(names))
            axes.barh(place + offset, figures[name], height=0.9, color=colour, label=label)
            axes.text(figures[name] + 1, place + offset, f"{figures[name]:.1f}", va="center", fontsize=7)
            drawn.add(name)
        ticks.append((place + (len(known) - 1) / 2, _plain(task)))
        place += len(known) + 1
    axes.set_yticks([middle for middle, _ in ticks], [name for _, name in ticks])
    axes.set(xlim=(0, 112), ylim=(place - 0.5, -1), xlabel="percent")
    axes.spines[["top", "right"]].set_visible(False)
    if drawn:
        part.legend(loc="outside lower center", ncols=6, frameon=False, fontsize="small")


def _known(figures: Figures, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if figures.get(name) is not None]


def _plain(text: str) -> str:
    """Return a name as matplotlib shows it: a dollar would begin a formula."""
    return text.replace("$", r"\$")[:40]


def _pyplot() -> object:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(plt: object, figure: object, picture: Path) -> None:
    figure.savefig(picture, dpi=120)
    plt.close(figure)
