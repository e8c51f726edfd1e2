"""PMC-VQA (Zhang et al., 2023): multiple-choice questions on figures from PubMed Central, as CSV files."""

import csv
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from internvl_chat.eval.benchmarks.item import Benchmark, Figure, Item
from internvl_chat.eval.benchmarks.reading import (
    EVERYTHING,
    Format,
    Request,
    Row,
    choice_item,
    find_image,
    optional_string,
    read_rows,
    required_strings,
)
from internvl_chat.utils.errors import DataError

_FOLDERS = ("images", "figures", "images_2", ".")
_CHOICES = [f"Choice {letter}" for letter in ascii_uppercase[:4]]


def read_pmc_vqa(file: Path, request: Request = EVERYTHING) -> Benchmark:
    """Read `test_clean.csv`, `test.csv` or `test_2.csv`; the name of the file is the task.

    Args:
        file: CSV file, next to the content of `images.zip` (`images/` or `figures/`).
        request: whether the images are needed.

    Raises:
        DataError: the file is missing, is not CSV, or lacks a column.
    """
    if not file.is_file():
        raise DataError("not a file; --data must be a CSV file of PMC-VQA, such as test_clean.csv", file=file)
    header, rows = _read_csv(file)
    # Version 2 has no `Answer_label`; its `Answer` is the letter.
    answer_key = "Answer_label" if "Answer_label" in header else "Answer"
    missing = {"Figure_path", "Question", *_CHOICES, answer_key} - {*header}
    if missing:
        raise DataError(f"not PMC-VQA: no column {', '.join(sorted(missing))}", file=file)
    roots = [file.parent / name for name in _FOLDERS]
    parse = partial(_parse, task=file.stem, answer_key=answer_key, roots=roots, images=request.images)
    rule = Format(parse, lambda row: file.stem, answer_key, answers="letter")
    return Benchmark("pmc-vqa", tuple(read_rows(rows, rule)))


def _read_csv(file: Path) -> tuple[list[str], list[Row]]:
    """Return the names of the columns, and the rows as dicts.

    Raises:
        DataError: the file is not UTF-8 or not CSV.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream)
            header = [name.strip() for name in next(reader, [])]
            cells = ((reader.line_num, dict(zip(header, row, strict=False))) for row in reader)
            return header, [
                Row(partial(dict, row), file, partial("line {}".format, line)) for line, row in cells
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot be read as CSV: {error}", file=file) from None


def _parse(row: Mapping[str, Any], *, task: str, answer_key: str, roots: list[Path], images: bool) -> Item:
    name, question, *choices = required_strings(row, "Figure_path", "Question", *_CHOICES)
    figure = Figure(name, path=find_image(name, roots, required=images))
    # The options begin with their letters (" A:Focal uptake").
    texts = [
        choice.strip().removeprefix(f"{letter}:") for letter, choice in zip("ABCD", choices, strict=True)
    ]
    if not all(text.strip() for text in texts):
        raise DataError("an option is empty")
    answer = optional_string(row, answer_key).strip()
    return choice_item(task, question.strip(), answer, (figure,), [text.strip() for text in texts])
