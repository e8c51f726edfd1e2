"""HTML page of an evaluation: tables, plots, and every item with figures, answer and scores."""

from collections.abc import Mapping
from pathlib import Path

from internvl_chat.eval.report.items import Evaluation, items_page
from internvl_chat.eval.report.table import NOTE, PAPER_NOTE, metric_tables, paper_tables
from internvl_chat.eval.scoring import Scores
from internvl_chat.utils.html import html_image, html_table


def evaluation_page(
    evaluation: Evaluation, images: Mapping[str, str], scores: Scores, plots: Mapping[str, Path]
) -> str:
    """Return the HTML page.

    Args:
        evaluation: the scored answers.
        images: id -> data URL of the images of the items.
        scores: scores of the tasks.
        plots: description of a plot -> PNG file.
    """
    model, protocol = evaluation.model, evaluation.protocol
    parts = []
    if evaluation.benchmark == "pmc-mi":
        parts += ["<h2>Comparison with the published results</h2>", f"<p>{PAPER_NOTE}</p>"]
        parts += [
            html_table(header, [tuple(cell.replace("**", "") for cell in row) for row in rows])
            for header, rows in paper_tables(scores.tasks, model, protocol)
        ]
    parts += ["<h2>All metrics</h2>", *(html_table(*table) for table in metric_tables(scores.tasks))]
    pictures = (html_image(file.read_bytes(), "png", text) for text, file in plots.items())
    shown = "".join(f"<div class='plot'>{picture}</div>" for picture in pictures)
    parts += [f"<details><summary>Plots</summary>{shown}</details>"]
    lead = f"Protocol: {protocol}. {NOTE}"
    return items_page(f"{evaluation.benchmark}: {model}", lead, parts, [evaluation], images)
