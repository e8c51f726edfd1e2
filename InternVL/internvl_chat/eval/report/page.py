"""HTML page with the question, figures, reference, answer and scores of each item."""

import html
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from internvl_chat.eval.benchmarks.item import Benchmark, Figure, Item, Key
from internvl_chat.eval.report.table import LABELS, NOTE, metric_tables, paper_tables
from internvl_chat.eval.scoring import Scores
from internvl_chat.utils.html import html_image, html_page, html_table, jpeg_thumbnail

# Pages with too many images are slow in a browser.
MAX_ITEMS_PER_TASK = 500
_THUMBNAIL_PIXELS = 240
_STYLE = """
.item { border: 1px solid var(--line); border-radius: .4rem; margin: 1rem 0; padding: .2rem 1rem; }
.item h4 { margin: .5rem 0; } .text { white-space: pre-wrap; overflow-wrap: anywhere; }
.right { border-left: .4rem solid var(--good); } .wrong { border-left: .4rem solid var(--error); }
figure { display: inline-block; margin: .3rem; vertical-align: top; max-width: 16rem; }
figcaption { font-size: .8rem; color: var(--muted); }
dt { font-weight: 600; margin-top: .4rem; } dd { margin: 0; }
.scores { color: var(--muted); font-size: .9rem; }
"""


def evaluation_page(
    benchmark: Benchmark,
    answers: Mapping[Key, str],
    scores: Scores,
    *,
    model: str,
    pictures: Mapping[str, Path],
) -> str:
    """Return the HTML page, with at most `MAX_ITEMS_PER_TASK` items per task.

    Args:
        benchmark: benchmark restricted to the answered items.
        answers: item -> answer.
        scores: scores of the items and tasks.
        model: model name.
        pictures: description of a plot -> its PNG file.

    Raises:
        DataError: a figure cannot be decoded.
    """
    tables = paper_tables(scores.tasks, model) if benchmark.name == "pmc-mi" else []
    parts = [f"<p>{NOTE}</p>"]
    plain = [(header, [tuple(c.replace("**", "") for c in row) for row in rows]) for header, rows in tables]
    parts += [html_table(*table) for table in (*plain, *metric_tables(scores.tasks))]
    parts += [
        f"<div class='plot'>{html_image(file.read_bytes(), 'png', text)}</div>"
        for text, file in pictures.items()
    ]
    for task in benchmark.tasks:
        items = [item for item in benchmark.items if item.task == task]
        more = len(items) - MAX_ITEMS_PER_TASK
        rest = f"<p>and {more:,} more in predictions.jsonl</p>" if more > 0 else ""
        shown = "".join(_item(i, answers[i.key], scores.items[i.key]) for i in items[:MAX_ITEMS_PER_TASK])
        parts.append(
            f"<details><summary>{html.escape(task)}: {len(items):,} items</summary>{shown}{rest}</details>"
        )
    _thumbnail.cache_clear()
    return html_page(f"{benchmark.name}: {model}", parts, _STYLE)


def _item(item: Item, answer: str, scores: Mapping[str, float]) -> str:
    figures = "".join(_figure(figure) for figure in item.figures)
    shown = ", ".join(f"{LABELS[name]} {value:.3f}" for name, value in scores.items())
    kind = "" if "accuracy" not in scores else " right" if scores["accuracy"] else " wrong"
    if item.choices:
        answer = f"{answer}\n(parsed as {item.selected_letter(answer) or 'no option'})"
    texts = (("Question", item.question), ("Reference", item.reference), ("Answer", answer))
    listed = "".join(f"<dt>{name}</dt><dd class='text'>{html.escape(text)}</dd>" for name, text in texts)
    return (
        f"<div class='item{kind}'><h4>{html.escape(item.task)} {item.index}</h4>{figures}"
        f"<dl>{listed}</dl><p class='scores'>{html.escape(shown)}</p></div>"
    )


def _figure(figure: Figure) -> str:
    title = html.escape(f"{figure.label} {figure.name}".strip())
    if figure.path is not None and not figure.path.exists():  # scoring does not require the images
        return f"<figure><figcaption>{title} (the image is not available)</figcaption></figure>"
    picture = html_image(_thumbnail(figure), "jpeg", figure.label or figure.name)
    return f"<figure>{picture}<figcaption>{title}</figcaption></figure>"


@cache  # items may share a figure
def _thumbnail(figure: Figure) -> bytes:
    """Return a JPEG thumbnail of a figure."""
    return jpeg_thumbnail(figure.decode(), _THUMBNAIL_PIXELS)
