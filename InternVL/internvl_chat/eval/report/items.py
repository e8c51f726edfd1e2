"""Items of an evaluation as data, and the list of items in the HTML pages (`items.html`, `.css`, `.js`)."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from internvl_chat.eval.benchmarks.item import Benchmark, Figure, Item, Key
from internvl_chat.eval.report.table import LABELS
from internvl_chat.eval.scoring import Scores
from internvl_chat.inference.engine import is_truncated
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.html import html_page, image_data_url, jpeg_thumbnail, json_script

# Number of images -> longer side of their thumbnails in pixels, so that a page stays below about 50 MB.
_PIXELS = {300: 800, 1000: 480, 3000: 280}
_FEWEST_PIXELS = 160
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class ReportItem:
    """An item with the answer of one model. The fields are the JSON keys in `report.json`.

    Attributes:
        reference: expected answer; for multiple choice the letter and the text of the option.
        images: `title` of each image, and its `id` in the page (None if the image is not available).
        answer: `text`; `parsed`, the option read from it ("" if there is none, None for open questions);
            `truncated`; and `scores`, metric -> score from 0 to 1.
    """

    task: str
    index: int
    question: str
    reference: str
    images: Sequence[Mapping[str, str | None]]
    answer: Mapping[str, Any]

    @property
    def key(self) -> Key:
        """Task and index, which identify the item in its benchmark."""
        return (self.task, self.index)


@dataclass(frozen=True)
class Evaluation:
    """The scored answers of one model to a benchmark. The fields are the JSON keys of `report.json`.

    Attributes:
        protocol: name of the protocol, with any deviation from it.
    """

    benchmark: str
    model: str
    protocol: str
    items: Sequence[ReportItem] = field(repr=False)

    def to_json(self) -> str:
        """Return the content of `report.json`."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def read(cls, file: Path) -> "Evaluation":
        """Read a `report.json`.

        Raises:
            DataError: the file is missing or malformed.
        """
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            items = [ReportItem(**row) for row in values.pop("items")]
            if not all(isinstance(value, str) for value in values.values()) or not all(map(_is_valid, items)):
                raise ValueError("a value has the wrong type")
            return cls(**values, items=items)
        except FileNotFoundError:
            advice = "not an evaluation; run m3llm eval --bench with this --out (existing answers are reused)"
            raise DataError(f"no {file.name}: {advice}", file=file.parent) from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(f"not the report of an evaluation: {error}", file=file) from None


def _is_valid(item: ReportItem) -> bool:
    """Return whether the values of an item in a `report.json` have the expected types."""
    answer = item.answer
    texts = [item.task, item.question, item.reference, answer["text"], *(i["title"] for i in item.images)]
    names = [image["id"] for image in item.images]
    scores = answer["scores"].values()
    return (
        isinstance(item.index, int)
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(name, str | None) for name in names)
        and all(isinstance(score, int | float) and math.isfinite(score) for score in scores)
    )


def build_evaluation(
    benchmark: Benchmark,
    answers: Mapping[Key, str],
    scores: Scores,
    *,
    model: str,
    protocol: str,
    progress: Callable[[Sequence[Figure]], Iterable[Figure]] = iter,
) -> tuple[Evaluation, dict[str, str]]:
    """Return an evaluation as data, and its images (id -> data URL), each of which is embedded once.

    Args:
        benchmark: benchmark restricted to the answered items.
        answers: item -> answer.
        scores: scores of the items.
        model: model name.
        protocol: name of the protocol, with any deviation from it.
        progress: wraps the images in a progress bar.
    """
    figures = {figure.path or figure.content: figure for item in benchmark.items for figure in item.figures}
    thumbnails = zip(figures, _thumbnails(list(figures.values()), progress), strict=True)
    urls = {source: (f"i{number}", url) for number, (source, url) in enumerate(thumbnails) if url}
    ids = {source: name for source, (name, _) in urls.items()}
    items = [_report_item(item, answers[item.key], scores.items[item.key], ids) for item in benchmark.items]
    return Evaluation(benchmark.name, model, protocol, items), dict(urls.values())


def _report_item(
    item: Item, answer: str, scores: Mapping[str, float], ids: Mapping[Path | bytes | None, str]
) -> ReportItem:
    images = [
        {"title": f"{figure.label} {figure.name}".strip(), "id": ids.get(figure.path or figure.content)}
        for figure in item.figures
    ]
    values = {
        "text": answer,
        "parsed": _option(item, item.selected_letter(answer)) if item.choices else None,
        "truncated": is_truncated(answer),
        "scores": {name: round(value, 6) for name, value in scores.items() if math.isfinite(value)},
    }
    reference = _option(item, item.reference) if item.choices else item.reference
    return ReportItem(item.task, item.index, item.question, reference, images, values)


def _option(item: Item, letter: str | None) -> str:
    """Return the letter and text of an option, or "" for None."""
    return f"{letter}. {item.choices[ascii_uppercase.index(letter)]}" if letter else ""


def _thumbnails(
    figures: Sequence[Figure], progress: Callable[[Sequence[Figure]], Iterable[Figure]]
) -> list[str | None]:
    """Return a data URL per figure; None if it cannot be decoded, because scoring does not need it."""
    pixels = next((side for count, side in _PIXELS.items() if len(figures) <= count), _FEWEST_PIXELS)

    def encode(figure: Figure) -> str | None:
        try:
            return image_data_url(jpeg_thumbnail(figure.decode(), pixels), "jpeg")
        except DataError:
            return None

    with ThreadPoolExecutor() as pool:
        urls = pool.map(encode, figures)
        return [next(urls) for _ in progress(figures)]


def items_page(
    title: str, lead: str, body: Iterable[str], evaluations: Sequence[Evaluation], images: Mapping[str, str]
) -> str:
    """Return an HTML page in which the items can be searched, filtered and sorted.

    Args:
        title: title of the page in plain text.
        lead: line below the title in plain text.
        body: HTML fragments between the overview of the tasks and the items.
        evaluations: one evaluation, or several with the same items in the same order.
        images: id -> data URL of the images of the first evaluation.
    """
    first = evaluations[0]
    rows = [
        {
            "task": item.task,
            "index": item.index,
            "question": item.question,
            "reference": item.reference,
            "images": item.images,
            "answers": [evaluation.items[number].answer for evaluation in evaluations],
        }
        for number, item in enumerate(first.items)
    ]
    data = {"models": [evaluation.model for evaluation in evaluations], "labels": LABELS, "items": rows}
    html, style, script = (
        (_HERE / f"items.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    parts = [
        f"<p class='lead'>{escape(lead)}</p>",
        "<section id='overview' aria-label='Tasks'></section>",
        *body,
        html,
        json_script("data", data),
        json_script("images", images),
        f"<script>\n{script}</script>",
    ]
    return html_page(title, parts, style)
