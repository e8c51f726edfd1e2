"""Write the files of an evaluation report: metrics, table, plots, data and HTML page."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from internvl_chat.constants import STANDARD_PROTOCOL
from internvl_chat.eval.benchmarks.item import Benchmark, Figure, Key
from internvl_chat.eval.report.items import build_evaluation
from internvl_chat.eval.report.page import evaluation_page
from internvl_chat.eval.report.plots import plot_bars, plot_radar
from internvl_chat.eval.report.table import is_partial, markdown
from internvl_chat.eval.scoring import Scores
from internvl_chat.utils.files import write_json, write_text

PAGE, DATA = "report.html", "report.json"


def write_report(
    folder: Path,
    benchmark: Benchmark,
    answers: Mapping[Key, str],
    scores: Scores,
    *,
    model: str,
    protocol: str = STANDARD_PROTOCOL,
    progress: Callable[[Sequence[Figure]], Iterable[Figure]] = iter,
) -> None:
    """Write `metrics.json`, `table.md`, the plots, `report.json` and `report.html`; overwrite existing files.

    The radar plot is omitted if it would have fewer than three axes.

    Args:
        folder: output folder, created if needed.
        benchmark: benchmark with the answered items.
        answers: item -> answer.
        scores: scores of the items and tasks.
        model: model name.
        protocol: name of the protocol, with any deviation from it.
        progress: wraps the images of the items in a progress bar.
    """
    folder.mkdir(parents=True, exist_ok=True)
    more = {} if protocol == STANDARD_PROTOCOL else {"protocol": protocol}
    write_json(folder / "metrics.json", {task: metrics | more for task, metrics in scores.tasks.items()})
    table = markdown(scores.tasks, benchmark=benchmark.name, model=model, protocol=protocol)
    write_text(folder / "table.md", table)
    bars, radar = folder / "bars.png", folder / "radar.png"
    partial = " (partial)" if any(map(is_partial, scores.tasks.values())) else ""
    names = {"benchmark": benchmark.name, "model": model + partial}
    plot_bars(scores.tasks, bars, **names)
    plots = {"main metrics of every task": bars}
    if plot_radar(scores.tasks, radar, **names):
        plots = {"metrics as a radar plot": radar, **plots}
    else:
        radar.unlink(missing_ok=True)
    evaluation, images = build_evaluation(
        benchmark, answers, scores, model=model, protocol=protocol, progress=progress
    )
    write_text(folder / DATA, evaluation.to_json())
    write_text(folder / PAGE, evaluation_page(evaluation, images, scores, plots))
