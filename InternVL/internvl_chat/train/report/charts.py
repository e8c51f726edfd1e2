"""Charts of one or several runs: losses, gradient norm, learning rate, throughput, memory and validation."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from internvl_chat.train.monitor.loss_curves import Curve, centered_mean, loss_limits
from internvl_chat.train.report.figure import NEUTRAL, Chart, curve, curve_style, faint, make_chart, marks
from internvl_chat.train.report.run import ALL, Run
from internvl_chat.utils.plotting import ORANGE
from internvl_chat.utils.text import counted

Runs = Mapping[str, Run]

_RED = "#B00020"
_LEGEND_NOTE = "Click a dataset in the legend to hide it, double-click to show it alone."
_SPEED_NOTE = "Without the pauses for validation and checkpoints."
_NOTHING = np.zeros(0)


class _Column(NamedTuple):
    """Chart of a column of the steps.

    Attributes:
        digits: format of the values.
        ticks: format of the tick labels of the y axis.
        mean: whether to draw the mean over a window of steps.
        weights: column with the weights of the mean.
    """

    name: str
    title: str
    note: str = ""
    digits: str = ".4g"
    ticks: str | None = None
    mean: bool = True
    weights: str | None = None


_COLUMNS = (
    _Column("grad_norm", "Gradient norm", "Before clipping."),
    _Column("learning_rate", "Learning rate", digits=".3g", ticks="~e", mean=False),
    _Column("records_per_second", "Records per second", _SPEED_NOTE, weights="seconds"),
    _Column("tokens_per_second", "Tokens per second", _SPEED_NOTE, ",.0f", weights="seconds"),
    _Column("mfu", "Model FLOPs utilization", "Of the peak of the device.", ".1%", ".0%", weights="seconds"),
    _Column("load_imbalance", "Load imbalance", "FLOPs of the busiest rank, divided by the mean.",
            ".3f", weights="seconds"),
    _Column("max_memory_gb", "Peak memory of rank 0, in GB", digits=".2f", mean=False),
)  # fmt: skip


def run_charts(runs: Runs) -> list[Chart]:
    """Return the charts of the training steps; the runs are keyed by name."""
    charts = [_loss(runs), *_dataset_losses(runs), *(_column(runs, column) for column in _COLUMNS)]
    return [chart for chart in charts if chart is not None]


def validation_charts(runs: Runs) -> list[Chart]:
    """Return the charts of the validation metrics; the runs are keyed by name."""
    titles = {"loss": "Validation loss", "em": "Exact match, in percent", "rougeL": "ROUGE-L, in percent"}
    charts = []
    for metric, title in titles.items():
        is_first = metric == "loss"
        note = "" if len(runs) > 1 else _LEGEND_NOTE if is_first else "Colors as above."
        legend = is_first or len(runs) > 1
        traces = list(_validation_curves(runs, metric))
        highest = max((float(trace.y.max()) for trace in traces), default=0.0)
        limits = None if is_first else (0.0, 1.08 * highest or 1.0)
        charts.append(
            make_chart(f"eval-{metric}", title, note, traces, limits=limits, legend=legend, wide=is_first)
        )
    return [chart for chart in charts if chart is not None]


def _validation_curves(runs: Runs, metric: str) -> Iterator[go.Scatter]:
    """Yield a curve per run or, for a single run, for all records and each dataset."""
    if len(runs) > 1:
        for number, (name, run) in enumerate(runs.items()):
            yield from curve(*run.validation_curve(ALL, metric), name, dots=True, **curve_style(number))
        return
    [run] = runs.values()
    yield from curve(*run.validation_curve(ALL, metric), ALL, dots=True, color=NEUTRAL, width=2.5)
    sets = sorted({name for row in run.validations for name in row.scores} - {ALL})
    for number, name in enumerate(sets if len(sets) > 1 else ()):
        yield from curve(*run.validation_curve(name, metric), name, dots=True, **curve_style(number))


def _loss(runs: Runs) -> Chart | None:
    several = len(runs) > 1
    curves = {name: run.steps.loss for name, run in runs.items()}
    evals = {name: run.validation_curve(ALL, "loss") for name, run in runs.items()}
    limits = loss_limits(
        np.concatenate([losses.losses for losses in curves.values()]),
        np.concatenate([values for _, values in evals.values()]),
    )
    traces: list[go.Scatter] = []
    for number, (name, losses) in enumerate(curves.items()):
        style = curve_style(number)
        traces += _raw_and_mean(losses, losses.mean(limits), name if several else "", style)
        eval_style = {**style, "dash": "dot"} if several else {"color": ORANGE}
        label = f"{name}, validation" if several else "validation"
        traces += curve(*evals[name], label, dots=True, **eval_style)
        traces += _outliers(runs[name], losses, limits, style["color"], legend=not several)
    if several:
        return make_chart("loss", "Loss", "Thin: each step. Thick: mean.", traces, limits=limits, wide=True)
    [run], [losses] = runs.values(), curves.values()
    note = f"Thin: each step. Thick: mean of {counted(2 * losses.half_width + 1, 'step')}."
    resumed = sorted({session.step for session in run.sessions if session.step})
    if resumed:
        note += f" Dotted lines: the run was resumed after step {', '.join(f'{step:,}' for step in resumed)}."
    return make_chart(
        "loss", "Loss", note if losses.half_width else "", traces, limits=limits, wide=True, dotted=resumed
    )


def _raw_and_mean(raw: Curve, mean: np.ndarray, name: str, style: Mapping[str, Any]) -> Iterator[go.Scatter]:
    """Yield the values of a run and their mean; only the values of a short run."""
    if not raw.half_width:
        yield from curve(raw.steps, raw.losses, name or "each step", dots=True, **style)
        return
    yield from faint(curve(raw.steps, raw.losses, "each step", **style), legend=not name)
    yield from curve(raw.steps, mean, name or "mean", **{**style, "width": 2.5})


def _outliers(
    run: Run, losses: Curve, limits: tuple[float, float], color: str, *, legend: bool
) -> Iterator[go.Scatter]:
    """Yield markers at the edge of the chart for skipped steps and for losses outside the limits."""
    low, high = limits
    skipped = np.isin(losses.steps, list(run.steps.skipped))
    for name, y, symbol, shade, chosen in (
        ("above the axis", high, "triangle-up", color, losses.losses > high),
        ("below the axis", low, "triangle-down", color, losses.losses < low),
        ("skipped", low, "x", _RED, skipped),
    ):
        steps, values = losses.steps[chosen], losses.losses[chosen]
        yield from marks(steps, values, y, name, symbol=symbol, color=shade, legend=legend)


def _dataset_losses(runs: Runs) -> Iterator[Chart | None]:
    """Yield a chart with all datasets of a run, or a chart per dataset with all runs."""
    sets = sorted({name for run in runs.values() for name in run.steps.sets})
    if len(sets) < 2:
        return
    if len(runs) == 1:
        [run] = runs.values()
        traces = [t for n, name in enumerate(sets) for t in _dataset_mean(run.steps.sets[name], name, n)]
        yield make_chart(
            "sets", "Loss by dataset", f"Mean of each dataset. {_LEGEND_NOTE}", traces, wide=True
        )
        return
    for position, dataset in enumerate(sets):
        traces = [
            trace
            for number, (name, run) in enumerate(runs.items())
            for trace in _dataset_mean(run.steps.sets.get(dataset), name, number)
        ]
        yield make_chart(f"set-{position}", f"Loss of {dataset}", "Mean.", traces)


def _dataset_mean(losses: Curve | None, name: str, number: int) -> Iterator[go.Scatter]:
    if losses is not None:
        # A dataset has few records per step, so its mean covers more steps.
        mean = losses.mean(loss_limits(losses.losses, _NOTHING), factor=2)
        yield from curve(losses.steps, mean, name, dots=not losses.half_width, **curve_style(number))


def _column(runs: Runs, column: _Column) -> Chart | None:
    several = len(runs) > 1
    curves = {name: run.steps.curve(column.name) for name, run in runs.items()}
    everything = np.concatenate([values.losses for values in curves.values()])
    traces: list[go.Scatter] = []
    for number, (name, values) in enumerate(curves.items()):
        style = {**curve_style(number), "digits": column.digits}
        label = name if several else ""
        if column.mean:
            weights = np.nan_to_num(runs[name].steps[column.weights]) if column.weights else None
            mean = centered_mean(values.losses, values.half_width, weights)
            traces += _raw_and_mean(values, mean, label, style)
        else:
            traces += curve(values.steps, values.losses, label, dots=not values.half_width, **style)
    limits = loss_limits(everything, _NOTHING) if column.mean else None
    if not column.mean and traces:
        limits = 0.0, 1.08 * float(np.nanmax(everything)) or 1.0
    return make_chart(
        column.name, column.title, column.note, traces, limits=limits, ticks=column.ticks, legend=several
    )
