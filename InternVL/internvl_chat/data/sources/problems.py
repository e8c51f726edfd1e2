"""What can be wrong with records and images: the kinds of problem, each with a sentence that explains it."""

from pathlib import Path
from typing import NamedTuple

# A record with one of these cannot be used.
ERRORS = {
    "file": "The annotation file cannot be read as records at all.",
    "json": "The line is not valid JSON.",
    "encoding": "The text is not valid UTF-8.",
    "line too long": "The record is larger than any real one; it is not read.",
    "structure": "The record is not an object with a conversation, or a part of it is of the wrong type.",
    "role": "A message is by somebody unknown, in the wrong place, or there is no answer to learn.",
    "empty answer": "Every answer is empty, so that nothing would be learnt but to say nothing.",
    "placeholders": "The <image> placeholders are not as many as the images.",
    "image missing": "An image file does not exist. The whole record is left out, so that no image takes "
    "the place of another.",
    "image outside root": "A relative image path leads out of the data set's root.",
    "image unreadable": "A file is empty, cut off, or no image.",
    "image depth": "An image has grey values of more than 8 bits and must be converted first.",
    "image too large": "An image has so many pixels that decoding it is refused.",
    "too long": "The record does not fit into max_seq_length, even with one tile an image.",
    "changed": "The record is not what it was when its length was measured.",
}

# These are told, but the record is used.
WARNINGS = {
    "fewer tiles": "Images are cut into fewer tiles than their limit allows, to fit max_seq_length.",
    "text cut": "The end of the text is cut off, to fit max_seq_length (--truncate_text True).",
    "empty message": "One of several answers is empty.",
    "message order": "Questions and answers do not take turns: one is missing, or they are in the wrong order.",
    "placeholder in answer": "An answer contains <image>, which shows nothing and is learnt as text.",
    "duplicate id": "Another record of the same data set has the same id.",
    "duplicate record": "Another record has the same conversation and images.",
    "not compared": "A part of a benchmark could not be read, so that the records were not held against it.",
    "length": "The data set's 'length' in the meta file is not its number of records.",
}

# What training and benchmark have in common (`leaks`).
LEAKS = {
    "same article": "A PMC id of the record is named by a benchmark.",
    "same image": "An image of the record is, byte for byte, one of a benchmark.",
    "similar image": "An image of the record looks like one of a benchmark.",
}

KINDS = {**ERRORS, **WARNINGS, **LEAKS}

_LONGEST_MESSAGE = 600
_LONGEST_ID = 200


class RecordProblem(ValueError):
    """Why a record cannot be used; the reader adds file, line and id.

    Args:
        message: what is wrong and how to repair it.
        kind: a key of `ERRORS`.
    """

    def __init__(self, message: str, kind: str = "structure") -> None:
        self.kind = kind
        super().__init__(message)


class Problem(NamedTuple):
    """Something found in a data set.

    Attributes:
        dataset: name of the set.
        index: of the record in its file, from 0; None where the file as a whole is meant.
        file: the annotation file.
        line: where the record begins, from 1.
        id: of the record, if it has one.
        kind: a key of `KINDS`.
        message: what is wrong and how to repair it.
    """

    dataset: str
    index: int | None
    file: Path
    line: int | None
    id: str | None
    kind: str
    message: str

    @property
    def is_error(self) -> bool:
        """True where the record cannot be used."""
        return self.kind in ERRORS

    def __str__(self) -> str:
        place = f"{self.file}" + (f", line {self.line}" if self.line is not None else "")
        return f"{place}{f' (record {self.id!r})' if self.id is not None else ''}: {self.message}"


def show_message(text: str) -> str:
    """Return a message whose length is bounded and that a terminal or a file takes as it is.

    What it quotes may come from a stranger: control characters and halves of characters are escaped.
    """
    return _printable(text, _LONGEST_MESSAGE)


def show_id(identity: object) -> str | None:
    """Return a record's id as text of bounded length; None for none."""
    if identity is None:
        return None
    try:
        return _printable(str(identity), _LONGEST_ID)
    except RecursionError:
        return "(nested too deeply)"


def _printable(text: str, longest: int) -> str:
    if len(text) > longest:
        text = f"{text[: longest * 2 // 3]} ... {text[-longest // 3 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
