"""Any questions on images as JSONL, in the few keys that most sets have or are quickly brought into."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from internvl_chat.constants import IMAGE_PLACEHOLDER
from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.eval.benchmarks.item import Benchmark, Figure, Item
from internvl_chat.eval.benchmarks.reading import (
    apart,
    find_image,
    list_options,
    read_items,
    right_letter,
    text_under,
    texts_under,
)
from internvl_chat.utils.errors import DataError


def read_vqa(file: Path) -> Benchmark:
    """Read a JSONL file (or a JSON array) of questions.

    An object has `question` and `answer`, and may have `image` (a path or several, relative to the file's
    folder), `choices` (options, which are then listed under the question; `answer` is a letter or an
    option's text) and `task` (what it is counted under; by default the file's name). Where a task has both
    kinds, its open questions are a task of their own.

    Raises:
        DataError: the file cannot be read, or items cannot be used.
    """
    if not file.is_file():
        raise DataError("no file of questions; --data must be a JSONL file", file=file)
    items = apart(read_items([(RecordFile(file), partial(_parse, file=file))]))
    return Benchmark("vqa", tuple(items))


def _parse(raw: Mapping[str, Any], *, file: Path) -> Item:
    if isinstance(raw.get("answer"), int | float) and not isinstance(raw["answer"], bool):
        raw = {**raw, "answer": str(raw["answer"])}
    question, answer = text_under(raw, "question", "answer")
    [task] = text_under(raw, "task") if "task" in raw else [file.stem]
    names = texts_under(raw, "image") or texts_under(raw, "images")
    choices = tuple(texts_under(raw, "choices"))
    placeholders = question.count(IMAGE_PLACEHOLDER)
    if placeholders not in (0, len(names)):
        raise DataError(f"{placeholders} {IMAGE_PLACEHOLDER} in the question, but {len(names)} images")
    figures = tuple(
        Figure(name, "" if len(names) == 1 else f"Fig-{number}", find_image(name, [file.parent]))
        for number, name in enumerate(names)
    )
    if not choices:
        return Item(task, 0, question, answer, figures)
    asked = f"{question}\n{list_options(choices)}"
    return Item(task, 0, asked, right_letter(answer, choices), figures, choices)
