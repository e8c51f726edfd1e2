"""The most important numbers of a run, and a table that compares several runs."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from internvl_chat.train.monitor.console import format_duration
from internvl_chat.train.report.run import ALL, Run
from internvl_chat.train.report.steps import mean_ends
from internvl_chat.utils.html import html_table
from internvl_chat.utils.text import counted

# Steps whose mean duration is used to estimate the time left.
_RECENT_STEPS = 100


class Card(NamedTuple):
    """A number with its label and an explanation."""

    value: str
    detail: str


def overview_cards(run: Run) -> dict[str, Card]:
    """Return the most important numbers of a run, keyed by label, without unknown ones."""
    cards = {
        "optimizer steps": _steps(run),
        "training loss": _training_loss(run),
        "validation loss": _validation_loss(run),
        "records per second": _speed(run),
        "time in steps": _time(run),
        "peak memory": _memory(run),
        "trained parameters": _parameters(run),
        "skipped steps": _skipped(run),
    }
    return {label: card for label, card in cards.items() if card is not None}


def summary_table(runs: Mapping[str, Run]) -> Markup:
    """Return a table with the numbers of each run."""
    cards = [overview_cards(run) for run in runs.values()]
    labels = list(dict.fromkeys(label for of_run in cards for label in of_run))
    rows = []
    for name, of_run, run in zip(runs, cards, runs.values(), strict=True):
        values = [of_run[label].value if label in of_run else "-" for label in labels]
        rows.append((name, *values, run.lowest_loss(ALL)))
    return Markup(html_table(("run", *labels, "lowest validation loss"), rows))


def _steps(run: Run) -> Card | None:
    if not len(run.steps):
        return None
    epoch, total = run.steps["epoch"][-1], run.total_steps
    of_total = "" if total in (None, run.last_step) else f" of {total:,}"
    return Card(f"{run.last_step:,}{of_total}", f"{epoch:.2f} epochs" if math.isfinite(epoch) else "")


def _training_loss(run: Run) -> Card | None:
    first, last = mean_ends(run.steps.loss)
    if math.isnan(last):
        return None
    window = counted(2 * run.steps.loss.half_width + 1, "step")
    return Card(f"{last:.3f}", f"from {first:.3f}, mean of {window}")


def _validation_loss(run: Run) -> Card | None:
    _, losses = run.validation_curve(ALL, "loss")
    known = losses[np.isfinite(losses)]
    return Card(f"{known[-1]:.3f}", f"lowest: {run.lowest_loss(ALL)}") if len(known) else None


def _speed(run: Run) -> Card | None:
    seconds = np.nansum(run.steps["seconds"])
    if not seconds:
        return None
    records, tokens = (np.nansum(run.steps[name]) / seconds for name in ("records", "tokens"))
    mfu = run.steps["mfu"]
    detail = f"{tokens:,.0f} tokens/s" + (f", MFU {np.nanmean(mfu):.0%}" if np.isfinite(mfu).any() else "")
    return Card(f"{records:{'.3g' if records < 1000 else ',.0f'}}", detail)


def _time(run: Run) -> Card | None:
    """Return the time in steps and, for an unfinished run, the estimated time left."""
    if not len(run.steps):
        return None
    seconds, pauses = (float(np.nansum(run.steps[name])) for name in ("seconds", "pause_seconds"))
    # The log has no validation and saving after the last step.
    detail = f"plus {format_duration(pauses)} between the steps"
    recent = run.steps["seconds"][-_RECENT_STEPS:]
    left = 0 if run.finished else (run.total_steps or 0) - run.last_step
    if left > 0 and np.isfinite(recent).any():
        per_step = float(np.nanmean(recent)) + pauses / len(run.steps)
        detail = f"about {format_duration(left * per_step)} left"
    return Card(format_duration(seconds), detail)


def _memory(run: Run) -> Card | None:
    peaks = run.steps["max_memory_gb"]
    return Card(f"{np.nanmax(peaks):.1f} GB", "of rank 0") if np.isfinite(peaks).any() else None


def _parameters(run: Run) -> Card | None:
    if not run.sessions:
        return None
    trained, total = run.sessions[-1].trained_parameters, run.sessions[-1].parameters
    return Card(short_number(trained), f"{trained / max(total, 1):.1%} of {short_number(total)}")


def _skipped(run: Run) -> Card:
    excluded = sum(record.step == 0 for record in run.unusable)
    detail = f"{counted(excluded, 'record')} excluded, {len(run.unusable) - excluded:,} skipped"
    return Card(f"{len(run.steps.skipped):,}", detail)


def short_number(value: float) -> str:
    """Format a count with a suffix.

    >>> short_number(950), short_number(37_700_000), short_number(7_940_000_000)
    ('950', '37.7 M', '7.94 B')
    """
    for size, suffix in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:g}"
