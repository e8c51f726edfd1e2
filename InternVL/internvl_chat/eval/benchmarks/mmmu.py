"""MMMU-Med: the five medical subjects of MMMU (Yue et al., CVPR 2024), as the published parquet files."""

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_chat.eval.benchmarks.item import Benchmark, Figure, Item
from internvl_chat.eval.benchmarks.reading import (
    check_text,
    list_options,
    numbered,
    refuse,
    right_letter,
    text_under,
)
from internvl_chat.utils.errors import DataError, UsageError

SUBJECTS = (
    "Basic_Medical_Science",
    "Clinical_Medicine",
    "Diagnostics_and_Laboratory_Medicine",
    "Pharmacy",
    "Public_Health",
)
_MOST_IMAGES = 7
_CALLED = re.compile(r"<image (\d)>")


def read_mmmu(data: Path) -> Benchmark:
    """Read `SUBJECT/validation-*.parquet` of the five subjects.

    An image that a question or an option calls `<image 2>` is shown before the question as `Fig-2`, in the
    way that the training data show several, and called so.

    Args:
        data: the folder of the subjects' folders.

    Raises:
        DataError: a subject is missing, or items cannot be used.
        UsageError: pyarrow is not installed.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise UsageError("MMMU comes as parquet files: pip install '.[eval]'") from None
    files = {subject: sorted((data / subject).glob("validation-*.parquet")) for subject in SUBJECTS}
    missing = [subject for subject, found in files.items() if not found]
    if missing:
        raise DataError(f"no validation-*.parquet of {', '.join(missing)}", file=data)
    items: list[Item] = []
    problems: list[str] = []
    for subject, file in ((subject, file) for subject, found in files.items() for file in found):
        try:
            rows = parquet.read_table(file).to_pylist()
        except (OSError, ValueError) as error:
            raise DataError(f"not a parquet file: {error}", file=file) from None
        for number, row in enumerate(rows, 1):
            try:
                items.append(_parse(subject, row))
            except DataError as error:
                problems.append(str(DataError(f"row {number}: {error.message}", file=file)))
    refuse(problems)
    return Benchmark("mmmu-med", tuple(numbered(items)), pooled=True)


def _parse(subject: str, row: Mapping[str, Any]) -> Item:
    name, question, answer, kind = text_under(row, "id", "question", "answer", "question_type")
    figures = tuple(
        Figure(f"{name}_{number}", f"Fig-{number}", content=image["bytes"])
        for number in range(1, _MOST_IMAGES + 1)
        if (image := row.get(f"image_{number}"))
    )
    choices = tuple(_CALLED.sub(r"Fig-\1", choice) for choice in _listed(row.get("options") or "[]"))
    question = _CALLED.sub(r"Fig-\1", question)
    check_text("".join(choices))
    if kind != "multiple-choice":
        first, *others = _listed(answer) if answer.startswith("[") else [answer]
        return Item(subject, 0, question, first, figures, accepted=tuple(others))
    asked = f"{question}\n{list_options(choices)}"
    return Item(subject, 0, asked, right_letter(answer, choices), figures, choices)


def _listed(text: str) -> list[str]:
    """Parse a list that the set holds as the text of a Python list."""
    try:
        found = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        found = None
    if not isinstance(found, list):
        raise DataError(f"not a list: {text:.80}")
    return [str(one) for one in found]
