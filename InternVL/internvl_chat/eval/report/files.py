"""The files of an evaluation beside its answers: figures for programs, table, plots and page for people."""

import json
from collections.abc import Mapping
from pathlib import Path

from internvl_chat.eval.benchmarks.item import Benchmark, Key
from internvl_chat.eval.report.page import evaluation_page
from internvl_chat.eval.report.plots import plot_bars, plot_radar
from internvl_chat.eval.report.table import markdown
from internvl_chat.eval.scoring import Scores

METRICS = "metrics.json"
TABLE = "table.md"
RADAR = "radar.png"
BARS = "bars.png"
PAGE = "report.html"


def write_report(
    folder: Path, benchmark: Benchmark, answers: Mapping[Key, str], scores: Scores, *, model: str
) -> None:
    """Write `metrics.json`, `table.md`, `bars.png`, `radar.png` and `report.html`, over earlier ones.

    The radar takes three axes at least; without them there is none.

    Args:
        folder: is made if need be.
        benchmark: the items that were answered.
        answers: of each item.
        scores: of the items and tasks.
        model: what the answers are of.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = json.dumps(scores.tasks, indent=2, ensure_ascii=False)
    (folder / METRICS).write_text(figures + "\n", encoding="utf-8")
    table = markdown(scores.tasks, benchmark=benchmark.name, model=model)
    (folder / TABLE).write_text(table, encoding="utf-8")
    named = {"benchmark": benchmark.name, "model": model}
    plot_bars(scores.tasks, folder / BARS, **named)
    pictures = {"the main figures of every task": folder / BARS}
    if plot_radar(scores.tasks, folder / RADAR, **named):
        pictures = {"the figures as a radar": folder / RADAR, **pictures}
    else:
        (folder / RADAR).unlink(missing_ok=True)
    page = evaluation_page(benchmark, answers, scores, model=model, pictures=pictures)
    (folder / PAGE).write_text(page, encoding="utf-8")
