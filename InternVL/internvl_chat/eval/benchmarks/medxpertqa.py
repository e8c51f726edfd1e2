"""MedXpertQA-MM (Zuo et al., ICML 2025): expert-level multiple-choice questions with one or more images."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.eval.benchmarks.item import Benchmark, Figure, Item
from internvl_chat.eval.benchmarks.reading import (
    EVERYTHING,
    Format,
    Request,
    check_images,
    check_keys,
    choice_item,
    file_rows,
    find_image,
    optional_string,
    read_rows,
    required_strings,
    string_list,
    with_indices,
)
from internvl_chat.utils.errors import DataError

_KEYS = ("question", "options", "images")
# Heading of the options in a question that lists them.
_OPTIONS_HEADING = "Answer Choices:"


def read_medxpertqa(data: Path, request: Request = EVERYTHING) -> Benchmark:
    """Read `MM/test.jsonl`; the tasks are the question types (Reasoning and Understanding).

    Args:
        data: folder with `MM/` and the content of `images.zip` (`images/`).
        request: whether the images are needed; all tasks are read.

    Raises:
        DataError: the file is missing.
    """
    file = data / "MM" / "test.jsonl"
    if not file.is_file():
        raise DataError("not MedXpertQA: no MM/test.jsonl", file=data)
    parse = partial(_parse, roots=[data / "images", data / "MM" / "images"], images=request.images)
    items = read_rows(file_rows(RecordFile(file)), Format(parse, _task, "label", answers="letter"))
    items.sort(key=lambda item: item.task)
    return Benchmark("medxpertqa-mm", tuple(with_indices(items)), pooled=True)


def _task(raw: Mapping[str, Any]) -> str:
    kind = raw.get("question_type")
    return kind if isinstance(kind, str) else ""


def _parse(raw: Mapping[str, Any], *, roots: list[Path], images: bool) -> Item:
    question, task = required_strings(raw, "question", "question_type")
    answer = optional_string(raw, "label")
    names, options = string_list(raw, "images"), raw.get("options")
    if not names:
        raise DataError("expected file names for 'images'")
    if not isinstance(options, Mapping) or list(options) != list(ascii_uppercase[: len(options)]):
        raise DataError("'options' must map the letters A, B, ... to the options")
    check_images(raw, _KEYS, names, question)
    check_keys(raw, _KEYS)
    choices = required_strings(options, *options)
    labels = [""] if len(names) == 1 else [f"Fig-{number}" for number in range(len(names))]
    figures = tuple(
        Figure(name, label, find_image(name, roots, required=images))
        for name, label in zip(names, labels, strict=True)
    )
    if _OPTIONS_HEADING in question:
        return Item(task, 0, question, answer, figures, tuple(choices))
    return choice_item(task, question, answer, figures, choices)
