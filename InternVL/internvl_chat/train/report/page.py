"""The report as a self-contained HTML page."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from internvl_chat.train.report.charts import run_charts, validation_charts
from internvl_chat.train.report.configuration import configuration_block, differences_table
from internvl_chat.train.report.figure import COLORS, Chart
from internvl_chat.train.report.overview import overview_cards, summary_table
from internvl_chat.train.report.run import Run, read_run
from internvl_chat.train.report.samples import sample_questions
from internvl_chat.train.report.tables import data_block, validation_table, warnings_block
from internvl_chat.utils.files import atomic_path
from internvl_chat.utils.html import STYLE, templates
from internvl_chat.utils.plotting import PALETTE
from internvl_chat.utils.text import counted

_TIME = "%Y-%m-%d %H:%M:%S"


def write_report(folders: Sequence[Path], file: Path, *, refresh: int | None = None) -> list[Run]:
    """Write the report of one or several runs and return what was read.

    Args:
        folders: output folders of the runs.
        file: HTML file to write; replaced atomically.
        refresh: seconds after which the page reloads itself; None for a page that does not.
    """
    runs = [read_run(folder) for folder in folders]
    page = report_page(dict(zip(unique_names(folders), runs, strict=True)), refresh=refresh)
    with atomic_path(file) as partial:
        # Lone surrogates, from file names that are not UTF-8, become question marks.
        partial.write_bytes(page.encode("utf-8", "replace"))
    return runs


def report_page(runs: Mapping[str, Run], *, refresh: int | None = None) -> str:
    """Return the page of one or several runs, keyed by name; for `refresh` see `write_report`."""
    several = len(runs) > 1
    charts, validations = run_charts(runs), validation_charts(runs)
    template = templates("internvl_chat.train.report").get_template("report.html")
    return template.render(
        title=" and ".join(runs) if len(runs) < 4 else f"{len(runs)} runs",
        eyebrow="Comparison of training runs" if several else "Training run",
        runs=[_heading(run, name, number) for number, (name, run) in enumerate(runs.items())],
        times=_times(list(runs.values())),
        refresh=refresh,
        alerts=_alerts(runs),
        cards={} if several else overview_cards(*runs.values()),
        summary=summary_table(runs) if several else "",
        charts=charts,
        validation_charts=validations,
        validation_table=validation_table(runs),
        questions=sample_questions(runs),
        data=_blocks(runs, data_block),
        warnings=_blocks(runs, warnings_block),
        differences=differences_table(runs) if several else "",
        configuration=_blocks(runs, configuration_block),
        figures=_embedded([*charts, *validations]),
        style=Markup(STYLE),
        plotly=Markup(get_plotlyjs()),
    )


def _blocks(runs: Mapping[str, Run], block: Callable[[Run], Markup]) -> list[dict[str, Any]]:
    return [{"name": name, "body": block(run)} for name, run in runs.items()]


def unique_names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that distinguish the folders.

    >>> unique_names([Path("/runs/a/lora"), Path("/runs/b/lora"), Path("/runs/full")])
    ['a/lora', 'b/lora', 'full']
    """
    parts = [folder.resolve().parts for folder in folders]
    names = []
    for own in parts:
        length = 1
        while length < len(own) and sum(other[-length:] == own[-length:] for other in parts) > 1:
            length += 1
        names.append("/".join(own[-length:]))
    return names


def _heading(run: Run, name: str, number: int) -> dict[str, Any]:
    total = run.total_steps
    if run.finished:
        status = {"kind": "good", "text": "finished"}
    else:
        of_total = "" if total is None else f" of {total:,}"
        status = {"kind": "warning", "text": f"unfinished: step {run.last_step:,}{of_total}"}
    description = run.sessions[-1].description if run.sessions else ""
    color = PALETTE[number % len(PALETTE)]
    swatch = f"light-dark({color}, {COLORS[color]})"
    return {"name": name, "status": status, "description": description, "swatch": swatch}


def _times(runs: Sequence[Run]) -> str:
    texts = []
    if len(runs) == 1:
        [run] = runs
        if run.sessions:
            texts.append(f"started {run.sessions[0].started.replace('T', ' ')[:19]}")
        if len(run.sessions) > 1:
            texts.append(f"resumed {counted(len(run.sessions) - 1, 'time')}")
        if run.changed:
            texts.append(f"last change {run.changed.strftime(_TIME)}")
    return " · ".join([*texts, f"report written {datetime.now().astimezone().strftime(_TIME)}"])


def _alerts(runs: Mapping[str, Run]) -> list[dict[str, str]]:
    """Return the last error in the log of each unfinished run, and all damaged files."""
    alerts = []
    for name, run in runs.items():
        prefix = f"{name}: " if len(runs) > 1 else ""
        errors = [message for message in run.messages if message.severity == "error"]
        if errors and not run.finished:
            alerts.append({"kind": "error", "text": f"{prefix}{errors[-1].text}"})
        alerts += [{"kind": "warning", "text": f"{prefix}{problem}"} for problem in run.problems]
    return alerts


def _embedded(charts: Sequence[Chart]) -> Markup:
    """Return the figures and the colors of a dark page as JSON that cannot end the script element."""
    figures = ",".join(f'{{"key": {json.dumps(chart.key)}, "figure": {chart.figure}}}' for chart in charts)
    text = f'{{"charts": [{figures}], "colors": {json.dumps(COLORS)}}}'
    return Markup(text.replace("<", "\\u003c"))
