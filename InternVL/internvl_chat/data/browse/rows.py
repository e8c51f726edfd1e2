"""Rows of the record list and of the table of datasets."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from internvl_chat.constants import IMAGE_PLACEHOLDER
from internvl_chat.data.browse.catalog import Catalog
from internvl_chat.data.encode.encoder import RecordLengths
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.problems import ERRORS, WARNINGS, Problem, printable_message
from internvl_chat.utils.errors import DataError

_MAX_TEXT = 220


@dataclass(frozen=True)
class Row:
    """A record in the list.

    Attributes:
        id: printable id; None if the record has none or is not indexed yet.
        lengths: None if the record is unusable or not indexed yet.
        indexed: whether lengths and problems are known.
        question: start of the first question.
        answer: start of the first answer.
        num_images: number of images.
        error: why the record cannot be parsed.
    """

    set_number: int
    set_name: str
    index: int
    line: int
    id: str | None
    indexed: bool
    lengths: RecordLengths | None
    problems: list[Problem]
    question: str = ""
    answer: str = ""
    num_images: int = 0
    error: str = ""


def record_rows(catalog: Catalog, positions: Iterable[int]) -> list[Row]:
    """Return the rows of records; only these records are read."""
    return [_row(catalog, int(position)) for position in positions]


def _row(catalog: Catalog, position: int) -> Row:
    set_number, index = catalog.locate(position)
    records, problems = catalog.sets[set_number], catalog.problems(position)
    indexed = bool(catalog.indexed[position])
    usable = indexed and not any(problem.is_error for problem in problems)
    lengths = RecordLengths(*catalog.lengths[:, position].tolist()) if usable else None
    row = (set_number, records.spec.name, index, records.file.line(index), catalog.ids[position])
    try:
        catalog.check_file(set_number)
        record = records.record(index)
    except DataError as error:
        return Row(*row, indexed, lengths, problems, error=error.message)
    first = {message.role: message.content for message in reversed(record.messages)}
    question = first.get("user", "").replace(IMAGE_PLACEHOLDER, "")
    texts = (_start(question), _start(first.get("assistant", "")))
    return Row(*row, indexed, lengths, problems, *texts, len(record.images))


def _start(text: str) -> str:
    """Return the start of a text on one line."""
    line = " ".join(text[: 4 * _MAX_TEXT].split())
    return printable_message(line if len(line) <= _MAX_TEXT else f"{line[:_MAX_TEXT]} ...")


class SetRow(NamedTuple):
    """A dataset in the overview, with its numbers of records: indexed, unusable, and with warnings."""

    number: int
    records: RecordSet
    indexed: int
    errors: int
    warnings: int


def set_rows(catalog: Catalog) -> list[SetRow]:
    """Return the rows of all datasets."""
    indexed = np.flatnonzero(catalog.indexed)
    columns = [indexed, catalog.with_problem(ERRORS), catalog.with_problem(WARNINGS)]
    counts = [np.diff(np.searchsorted(column, catalog.bounds)).tolist() for column in columns]
    return [SetRow(number, records, *(column[number] for column in counts))
            for number, records in enumerate(catalog.sets)]  # fmt: skip
