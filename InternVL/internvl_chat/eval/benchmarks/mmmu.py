"""MMMU-Med: the five medical subjects of MMMU (Yue et al., CVPR 2024) as published parquet files."""

import ast
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from internvl_chat.eval.benchmarks.item import Benchmark, Figure, Item
from internvl_chat.eval.benchmarks.parquet import parquet_rows
from internvl_chat.eval.benchmarks.reading import (
    EVERYTHING,
    Format,
    Request,
    check_reserved_token,
    choice_item,
    optional_string,
    read_rows,
    required_strings,
    unknown_tasks,
    with_indices,
)
from internvl_chat.utils.errors import DataError, UsageError

SUBJECTS = (
    "Basic_Medical_Science",
    "Clinical_Medicine",
    "Diagnostics_and_Laboratory_Medicine",
    "Pharmacy",
    "Public_Health",
)
_MAX_IMAGES = 7
_IMAGE_REFERENCE = re.compile(r"<image\s*_?(\d)>", re.IGNORECASE)


def read_mmmu(data: Path, request: Request = EVERYTHING) -> Benchmark:
    """Read the files `SUBJECT/validation-*.parquet` of the five subjects, which become the tasks.

    As in the training data, images precede the question: a reference `<image 2>` in the text becomes `Fig-2`.

    Args:
        data: folder with one subfolder per subject.
        request: tasks to read.

    Raises:
        DataError: a subject is missing, or a file is not a parquet file.
        UsageError: pyarrow is not installed, or a task is unknown.
    """
    if unknown := [task for task in request.tasks or () if task not in SUBJECTS]:
        raise UsageError(unknown_tasks(unknown, "mmmu-med", SUBJECTS))
    subjects = [subject for subject in SUBJECTS if request.wants(subject)]
    files = {subject: sorted((data / subject).glob("validation-*.parquet")) for subject in subjects}
    missing = [subject for subject, paths in files.items() if not paths]
    if missing:
        raise DataError(f"no validation-*.parquet for {', '.join(missing)}", file=data)
    items: list[Item] = []
    for subject, file in ((subject, file) for subject, paths in files.items() for file in paths):
        rule = Format(partial(_parse, subject), partial(_subject, subject), "answer", answers="letter")
        items += read_rows(parquet_rows([file]), rule)
    return Benchmark("mmmu-med", tuple(with_indices(items)), pooled=True)


def _subject(subject: str, raw: Mapping[str, Any]) -> str:
    return subject


def _parse(subject: str, row: Mapping[str, Any]) -> Item:
    name, question, kind = required_strings(row, "id", "question", "question_type")
    answer = optional_string(row, "answer")
    figures = tuple(
        Figure(f"{name}_{number}", f"Fig-{number}", content=image["bytes"])
        for number in range(1, _MAX_IMAGES + 1)
        if (image := row.get(f"image_{number}")) and image.get("bytes")
    )
    options = _parse_list(row.get("options") or "[]")
    labels = {figure.label for figure in figures}
    used = dict.fromkeys(_IMAGE_REFERENCE.findall("\n".join((question, *options))))
    if missing := [f"image_{number}" for number in used if f"Fig-{number}" not in labels]:
        raise DataError(f"the question refers to {', '.join(missing)}, but the row has no such image")
    choices = [_IMAGE_REFERENCE.sub(r"Fig-\1", option) for option in options]
    question = _IMAGE_REFERENCE.sub(r"Fig-\1", question)
    check_reserved_token("".join(choices))
    if kind != "multiple-choice":
        first, *others = _parse_list(answer) if answer.startswith("[") else [answer]
        return Item(subject, 0, question, first, figures, accepted=tuple(others))
    return choice_item(subject, question, answer, figures, choices)


def _parse_list(text: str) -> list[str]:
    """Parse a list stored as a Python literal.

    Raises:
        DataError: the text is not a list.
    """
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = None
    if not isinstance(value, list):
        raise DataError(f"not a list: {text:.80}")
    return list(map(str, value))
