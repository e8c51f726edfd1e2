"""Write the files of an evaluation report: metrics, table, plots and HTML page."""

from collections.abc import Mapping
from pathlib import Path

from internvl_chat.eval.benchmarks.item import Benchmark, Key
from internvl_chat.eval.report.page import evaluation_page
from internvl_chat.eval.report.plots import plot_bars, plot_radar
from internvl_chat.eval.report.table import is_partial, markdown
from internvl_chat.eval.scoring import Scores
from internvl_chat.utils.files import write_json

PAGE = "report.html"


def write_report(
    folder: Path, benchmark: Benchmark, answers: Mapping[Key, str], scores: Scores, *, model: str
) -> None:
    """Write `metrics.json`, `table.md`, `bars.png`, `radar.png` and `report.html`; overwrite existing files.

    The radar plot is omitted if it would have fewer than three axes.

    Args:
        folder: output folder, created if needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", scores.tasks)
    table = markdown(scores.tasks, benchmark=benchmark.name, model=model)
    (folder / "table.md").write_text(table, encoding="utf-8")
    bars, radar = folder / "bars.png", folder / "radar.png"
    partial = " (partial)" if any(map(is_partial, scores.tasks.values())) else ""
    names = {"benchmark": benchmark.name, "model": model + partial}
    plot_bars(scores.tasks, bars, **names)
    pictures = {"main metrics of every task": bars}
    if plot_radar(scores.tasks, radar, **names):
        pictures = {"metrics as a radar plot": radar, **pictures}
    else:
        radar.unlink(missing_ok=True)
    page = evaluation_page(benchmark, answers, scores, model=model, pictures=pictures)
    (folder / PAGE).write_text(page, encoding="utf-8")
