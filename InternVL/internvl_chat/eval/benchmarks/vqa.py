"""Custom visual question answering (VQA) data in JSONL format."""

import unicodedata
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from internvl_chat.constants import IMAGE_PLACEHOLDER
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
    split_mixed_tasks,
    string_list,
)
from internvl_chat.utils.errors import DataError

_KEYS = ("question", "answer", "image", "images", "choices", "task")


def read_vqa(file: Path, request: Request = EVERYTHING) -> Benchmark:
    """Read a JSONL file (or a JSON array) of questions.

    Keys of an object:
    - `question`, `answer`
    - `image` (optional): one path or a list of paths, relative to the folder of the file
    - `choices` (optional): options, which are appended to the question; `answer` is then a letter or the text
      of an option
    - `task` (optional): task name (default: the file name)

    If a task mixes multiple-choice and open questions, its open questions become a separate task.

    Args:
        file: JSONL or JSON file.
        request: whether the images must exist; its tasks are ignored, and all tasks are read.

    Raises:
        DataError: the file is missing, or is neither JSONL nor a JSON array.
    """
    if not file.is_file():
        raise DataError("not a file; --data must be a JSONL file of questions", file=file)
    parse = partial(_parse, file=file, images=request.images)
    rule = Format(parse, partial(_task_of, file=file), answer_key="answer")
    items = split_mixed_tasks(read_rows(file_rows(RecordFile(file)), rule))
    return Benchmark("vqa", tuple(items))


def _task_of(raw: Mapping[str, Any], *, file: Path) -> str:
    task = raw.get("task", file.stem)
    return task if isinstance(task, str) else ""


def _parse(raw: Mapping[str, Any], *, file: Path, images: bool) -> Item:
    if isinstance(raw.get("answer"), int | float) and not isinstance(raw["answer"], bool):
        _reject_index(raw)
        raw = {**raw, "answer": str(raw["answer"])}
    [question], answer = required_strings(raw, "question"), optional_string(raw, "answer")
    answer = unicodedata.normalize("NFC", answer)  # as the tokenizer reads it
    [task] = required_strings(raw, "task") if "task" in raw else [file.stem]
    names = string_list(raw, "image") or string_list(raw, "images")
    choices = string_list(raw, "choices")
    if isinstance(raw.get("choices"), str) or len(choices) == 1:
        raise DataError("'choices' must be a list of at least two options")
    check_images(raw, _KEYS, names, question)
    check_keys(raw, _KEYS)
    placeholders = question.count(IMAGE_PLACEHOLDER)
    if placeholders not in (0, len(names)):
        raise DataError(f"{placeholders} {IMAGE_PLACEHOLDER} in the question, but {len(names)} images")
    figures = tuple(
        Figure(
            name, "" if len(names) == 1 else f"Fig-{number}", find_image(name, [file.parent], required=images)
        )
        for number, name in enumerate(names)
    )
    if not choices:
        return Item(task, 0, question, answer, figures)
    return choice_item(task, question, answer, figures, choices)


def _reject_index(raw: Mapping[str, Any]) -> None:
    """Reject a numeric answer that is the text of one option and the 0-based index of a different one.

    Raises:
        DataError: the answer is ambiguous.
    """
    choices, number = raw.get("choices") or [], raw["answer"]
    if str(number) in choices and number in range(len(choices)) and choices[int(number)] != str(number):
        raise DataError(
            f"the answer {number} is ambiguous: it is the text of one option and the 0-based index "
            "of a different one; put the text in quotes, or give the letter of the option"
        )
