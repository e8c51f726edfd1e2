"""HTML page that shows the answers of multiple models to the same questions side by side."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from PIL import Image

from internvl_chat.constants import IMAGE_PLACEHOLDER
from internvl_chat.utils.html import html_image, html_page, jpeg_thumbnail

_FIGURE_PIXELS, _PANEL_PIXELS = 360, 200
_IMAGE_LINE = re.compile(rf"(?:Fig-\d+: )?{IMAGE_PLACEHOLDER}\n?")
_STYLE = """
.item { background: var(--panel); border-radius: .5rem; margin: 1rem 0; padding: .8rem 1rem; }
.figures { display: flex; flex-wrap: wrap; gap: .6rem; align-items: flex-end; }
figure { margin: 0; } figcaption { font-size: .8rem; color: var(--muted); }
figure img { display: block; border: 1px solid var(--line); border-radius: .25rem; }
.question { white-space: pre-wrap; font-weight: 600; margin: .8rem 0 .3rem; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .6rem; }
.answer { background: var(--page); border-radius: .35rem; border-left: .3rem solid var(--error);
  padding: .35rem .7rem; }
.answer.right { border-color: var(--good); }
.answer b { color: var(--error); font-size: .85rem; } .answer.right b { color: var(--good); }
.answer p { margin: .15rem 0 0; max-height: 6rem; overflow-y: auto; }
.expected { margin: .2rem 0 .7rem; } .expected b, .answer span { color: var(--muted); font-size: .85rem; }
"""


@dataclass(frozen=True)
class ComparedRecord:
    """A question with the answers of multiple models.

    Attributes:
        task: task name, used as section heading; records of a task must be consecutive.
        question: the question, including image placeholders.
        images: RGB images, labeled Fig-0, Fig-1, ... in this order.
        reference: expected answer.
        answers: model name -> (answer, whether it is correct).
    """

    task: str
    question: str
    images: Sequence[Image.Image]
    reference: str
    answers: Mapping[str, tuple[str, bool]]


def comparison_page(
    title: str, introduction: Iterable[str], records: Iterable[ComparedRecord], end: Iterable[str] = ()
) -> str:
    """Return the HTML page, with the HTML fragments `introduction` and `end` before and after the records."""
    parts = list(introduction)
    for task, of_task in groupby(records, key=lambda record: record.task):
        parts += [f"<h2>{html.escape(task)}</h2>", *map(_item, of_task)]
    return html_page(title, [*parts, *end], _STYLE)


def _item(record: ComparedRecord) -> str:
    figures = "".join(_figure(number, image) for number, image in enumerate(record.images))
    answers = "".join(_answer(model, *answer) for model, answer in record.answers.items())
    question = html.escape(_IMAGE_LINE.sub("", record.question).strip())
    return (
        f"<div class='item'><div class='figures'>{figures}</div><p class='question'>{question}</p>"
        f"<p class='expected'><b>expected</b> {html.escape(record.reference)}</p>"
        f"<div class='answers'>{answers}</div></div>"
    )


def _figure(number: int, image: Image.Image) -> str:
    """Return a captioned thumbnail; the first image is larger, because it is the compound figure."""
    thumbnail = jpeg_thumbnail(image, _PANEL_PIXELS if number else _FIGURE_PIXELS)
    name = f"Fig-{number}"
    return f"<figure>{html_image(thumbnail, 'jpeg', name)}<figcaption>{name}</figcaption></figure>"


def _answer(model: str, text: str, correct: bool) -> str:
    kind, verdict = ("answer right", "✓ correct") if correct else ("answer", "✗ wrong")
    shown = html.escape(text) if text.strip() else "(no answer)"
    return f"<div class='{kind}'><span>{html.escape(model)}</span> <b>{verdict}</b><p>{shown}</p></div>"
