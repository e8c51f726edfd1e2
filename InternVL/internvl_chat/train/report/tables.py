"""Tables of the report: validation metrics, datasets, unusable records, and messages of the log."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from internvl_chat.train.report.run import Run
from internvl_chat.train.report.steps import mean_ends, number
from internvl_chat.utils.html import html_table
from internvl_chat.utils.text import counted

_MAX_ROWS = 100
# Column title -> field of a dataset in `sessions.jsonl`.
_SIZES = {
    "records": "records",
    "excluded": "excluded",
    "per epoch": "records_per_epoch",
    "tokens": "tokens",
    "supervised": "supervised_tokens",
    "tiles": "tiles",
}
_TRAINED = ("trained", "first loss", "last loss")
_METRICS = {"records": ",.0f", "loss": ".3f", "em": ".1f", "rougeL": ".1f"}
_LIMITS = {"longest": "longest", "tile limit": "max_tiles"}


def validation_table(runs: Mapping[str, Run]) -> Markup:
    """Return the metrics of the last validation by dataset, and the lowest loss; empty without any."""
    several = len(runs) > 1
    rows = []
    for name, run in runs.items():
        for part, scores in run.validations[-1].scores.items() if run.validations else ():
            values = [show(scores[metric], digits) for metric, digits in _METRICS.items()]
            rows.append((*([name] if several else []), part, *values, run.lowest_loss(part)))
    header = (*(["run"] if several else []), "dataset", "records", "loss", "exact match", "ROUGE-L")
    return Markup(html_table((*header, "lowest loss"), rows) if rows else "")


def data_block(run: Run) -> Markup:
    """Return the training and validation data by dataset, and the unusable records."""
    parts = []
    if run.sessions:
        session = run.sessions[-1]
        parts.append(_data_table(session.data, run))
        if session.validation_data:
            parts += ["<h3>Validation data</h3>", _data_table(session.validation_data, None)]
    elif run.steps.sets:
        rows = [(name, *_trained(run, name)) for name in run.steps.sets]
        parts.append(html_table(("dataset", *_TRAINED), rows))
    else:
        parts.append(
            "<p class='empty'>Unknown: the run has not started, or its folder has no sessions.jsonl.</p>"
        )
    if run.unusable:
        records = [
            (f"step {r.step:,}" if r.step else "before training", r.dataset, r.index, r.message)
            for r in run.unusable
        ]
        table = _first_rows(("when", "dataset", "record", "reason"), records, "ledger.jsonl")
        title = f"Excluded and skipped records: {len(records):,}"
        parts.append(f"<details open><summary>{title}</summary>{table}</details>")
    return Markup("".join(parts))


def _data_table(data: Sequence[Mapping[str, Any]], run: Run | None) -> str:
    """Return the table of datasets; with a run, also the trained records and the losses."""
    rows = []
    for entry in data:
        sizes = [show(entry.get(field), ",.0f") for field in (*_SIZES.values(), *_LIMITS.values())]
        rows.append([entry["dataset"], *sizes, *(_trained(run, entry["dataset"]) if run else ())])
    if len(rows) > 1:
        totals = [f"{sum(_count(entry.get(field)) for entry in data):,.0f}" for field in _SIZES.values()]
        trained = [f"{np.nansum(run.steps['records']):,.0f}", "-", "-"] if run else []
        rows.append(["all", *totals, *("-" for _ in _LIMITS), *trained])
    notes = []
    for field, text in (("with_fewer_tiles", "fewer tiles"), ("truncated", "truncated text")):
        if count := sum(_count(entry.get(field)) for entry in data):
            records = counted(int(count), "record")
            notes.append(f"<p>{records} with {text}, to fit the maximum number of tokens.</p>")
    header = ("dataset", *_SIZES, *_LIMITS, *(_TRAINED if run else ()))
    return html_table(header, rows) + "".join(notes)


def _trained(run: Run, dataset: str) -> list[str]:
    """Return the number of trained records of a dataset, and the mean loss at the start and at the end."""
    curve = run.steps.sets.get(dataset)
    if curve is None:
        return ["0", "-", "-"]
    return [f"{np.nansum(curve.records):,.0f}", *(show(value, ".3f") for value in mean_ends(curve))]


def warnings_block(run: Run) -> Markup:
    """Return the skipped steps, the messages of the log and, for an unfinished run, its end."""
    parts = []
    if run.steps.skipped:
        steps = [(f"{step:,}", reason) for step, reason in run.steps.skipped.items()]
        parts.append(_first_rows(("skipped step", "reason"), steps, "metrics.jsonl"))
    items = []
    for message in run.messages[:_MAX_ROWS]:
        similar = f"{message.count:,} similar messages, the last one at " if message.count > 1 else ""
        stamp = f"<small>{similar}{html.escape(message.time)}</small>"
        items.append(f"<li class='{message.severity}'>{stamp}{html.escape(message.text)}</li>")
    if items:
        parts.append(f"<ul class='messages'>{''.join(items)}</ul>")
    elif not run.log_end:
        parts.append(
            "<p class='empty'>No training_log.txt (the launchers write it): warnings are unknown.</p>"
        )
    elif not parts:
        parts.append("<p class='empty'>No warnings.</p>")
    if run.log_end and not run.finished:
        end = html.escape("\n".join(run.log_end))
        parts.append(f"<details><summary>End of the log</summary><pre tabindex='0'>{end}</pre></details>")
    return Markup("".join(parts))


def _first_rows(header: Sequence[str], rows: Sequence[Sequence[Any]], file: str) -> str:
    """Return a table of the first rows and the number of the others, which are in `file`."""
    more = len(rows) - _MAX_ROWS
    rest = f"<p>and {more:,} more in {file}</p>" if more > 0 else ""
    return html_table(header, rows[:_MAX_ROWS]) + rest


def show(value: Any, digits: str) -> str:
    """Format a number; `-` if it is unknown."""
    known = number(value)
    return "-" if math.isnan(known) else format(known, digits)


def _count(value: Any) -> float:
    known = number(value)
    return 0.0 if math.isnan(known) else known
