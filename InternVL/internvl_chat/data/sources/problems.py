"""Kinds of problems with records and images, each with an explanation for the user."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

# Errors: the record cannot be used.
ERRORS = {
    "file": "The annotation file cannot be read as records.",
    "json": "The line is not valid JSON.",
    "encoding": "The text is not valid UTF-8.",
    "line too long": "The line exceeds the size limit of a record and is not read.",
    "structure": "The record is not an object with a conversation, or one of its values has the wrong type.",
    "role": "A message has an unknown role or is in the wrong position, or there is no assistant message.",
    "empty answer": "All answers are empty, so no token is supervised.",
    "placeholders": "The numbers of <image> placeholders and images differ.",
    "image missing": "An image file does not exist. The entire record is excluded, so that the other images "
    "stay with their placeholders.",
    "image not read": "An image, a video or audio is named under a key or in a text where it is not read.",
    "image outside root": "A relative image path leaves the dataset's root.",
    "image unreadable": "A file is empty, truncated, or not an image.",
    "image depth": "An image has more than 8 bits per channel and must be converted first.",
    "image too large": "An image exceeds the pixel limit and is not decoded.",
    "too long": "The record does not fit into max_seq_length, even with one tile per image.",
    "changed": "The record has changed since its length was measured.",
}

# Warnings: reported, but the record is used.
WARNINGS = {
    "fewer tiles": "Images are split into fewer tiles than their limit allows, to fit max_seq_length.",
    "text truncated": "The end of the text is truncated to fit max_seq_length (--truncate_text True).",
    "empty message": "Some of the answers are empty.",
    "message order": "Questions and answers do not alternate: one is missing, or they are out of order.",
    "placeholder in answer": "An answer contains <image>, which shows no image and is trained on as text.",
    "placeholder not read": "A placeholder of another dialect, or <image> in a system message, is text.",
    "control token": "A text contains a control token such as <|im_end|>, which ends or starts a message.",
    "field not read": "A field that other programs act on is ignored.",
    "file not read": "A field that is not read names an existing image file.",
    "several frames": "A file has several pages or frames; only the first is used.",
    "transparency": "Transparency is dropped (--image_background white shows it on white).",
    "color depth": "An image has more than 8 bits per channel; the lower bits are dropped.",
    "exif rotation": "The rotation that the EXIF data asks for is not applied (--exif_transpose True).",
    "duplicate id": "Another record of the same dataset has the same id.",
    "duplicate record": "Another record has the same conversation and images.",
    "not compared": "Part of a benchmark could not be read, so the records were not compared with it.",
    "no records": "'repeat_time' is so small that none of the dataset's records is used.",
    "length": "The 'length' of the dataset in the meta file differs from its number of records.",
}

# Overlap of training data and benchmarks.
LEAKS = {
    "same article": "A benchmark contains a PMC id of the record.",
    "same image": "An image of the record is identical, byte for byte, to a benchmark image.",
    "similar image": "An image of the record looks like a benchmark image.",
}

KINDS = {**ERRORS, **WARNINGS, **LEAKS}

# What to do about a problem.
REMEDIES = {
    "file": "Check the path and the format of 'annotation' in the meta file: JSON Lines, or a JSON array.",
    "json": "Correct or delete the line.",
    "encoding": "Convert the file to UTF-8, for example with iconv, or correct the line.",
    "line too long": "Delete the line, or split it into several records.",
    "structure": "Write the record as documented, with 'conversations' or 'messages'.",
    "role": "Use the roles system, human and gpt, in this order, with at least one answer.",
    "empty answer": "Add an answer, or delete the record.",
    "placeholders": "Write one <image> in a question for each image of the record.",
    "image missing": "Copy the image to this path, or correct 'root' in the meta file.",
    "image not read": "Name the image under 'image' or 'images', with one <image> in a question.",
    "image outside root": "Set 'root' in the meta file to a folder that contains all images.",
    "image unreadable": "Copy or download the image again, or delete the record.",
    "image depth": "Convert the image to 8 bits per channel, with a window that suits its contents.",
    "image too large": "Reduce the size of the image.",
    "too long": "Raise --max_seq_length, shorten the text, or pass --truncate_text True.",
    "changed": "Run the command again; the length of the record is then recomputed.",
    "fewer tiles": "Raise --max_seq_length if the details of the images matter.",
    "text truncated": "Raise --max_seq_length, or shorten the text.",
    "empty message": "Add the missing answers, or delete these messages.",
    "message order": "Check that no question or answer was lost.",
    "placeholder in answer": "Remove <image> from the answer, or move it to the question.",
    "placeholder not read": "Write <image> where the model should see the image, or rephrase the text.",
    "control token": "Rephrase the text, or pass --escape_control_tokens True.",
    "field not read": "Remove the field, or put what it means into the conversation.",
    "file not read": "Name the image under 'image' or 'images' if the model should see it.",
    "several frames": "Save the pages or frames that matter as images of their own.",
    "transparency": "Nothing if the image looks right without it; otherwise --image_background white.",
    "color depth": "Nothing if 8 bits show enough; otherwise convert the image with a suitable window.",
    "exif rotation": "Pass --exif_transpose True, or save the image rotated.",
    "duplicate id": "Nothing, unless both are meant to be the same record; ids do not affect training.",
    "duplicate record": "Delete the duplicates, unless the record is repeated on purpose.",
    "not compared": "Correct the path or file named in the message, then check again.",
    "no records": "Raise 'repeat_time', or remove the dataset from the meta file.",
    "length": "Correct 'length' in the meta file; the actual number of records is used.",
    "same article": "Delete the record if results on this benchmark will be reported.",
    "same image": "Delete the record if results on this benchmark will be reported.",
    "similar image": "Compare both images; delete the record if they show the same figure.",
}

_MAX_MESSAGE_LENGTH = 600
_MAX_ID_LENGTH = 200


class RecordError(ValueError):
    """A record cannot be used. Callers that know the file, line and id turn this into a `DataError`.

    Args:
        message: what is wrong and how to fix it.
        kind: a key of `ERRORS`.
    """

    def __init__(self, message: str, kind: str = "structure") -> None:
        self.kind = kind
        super().__init__(message)


class Problem(NamedTuple):
    """A problem in a dataset.

    Attributes:
        index: index of the record in its file; None for the file as a whole.
        line: line on which the record begins, counted from 1.
        kind: a key of `KINDS`.
        message: what is wrong and how to fix it.
    """

    dataset: str
    index: int | None  # type: ignore[assignment]  # hides tuple.index
    file: Path
    line: int | None
    id: str | None
    kind: str
    message: str

    @property
    def is_error(self) -> bool:
        """Whether the record cannot be used."""
        return self.kind in ERRORS

    def __str__(self) -> str:
        location = f"{self.file}" + (f", line {self.line}" if self.line is not None else "")
        return f"{location}{f' (record {self.id!r})' if self.id is not None else ''}: {self.message}"


def describe_by_kind(problems: Iterable[Problem]) -> list[str]:
    """Return a line for each dataset and kind of problem: the number of records and one example."""
    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.dataset, problem.kind), []).append(problem)
    lines = []
    for (dataset, kind), group in groups.items():
        count = "1 record: " if len(group) == 1 else f"{len(group):,} records, for example: "
        lines.append(f"dataset {dataset}: {kind}: {'' if group[0].index is None else count}{group[0]}")
    return lines


def printable_message(text: str) -> str:
    """Return a message with bounded length and without control characters.

    Messages quote untrusted data: control characters and lone surrogates are escaped.
    """
    return _printable(text, _MAX_MESSAGE_LENGTH)


def printable_id(record_id: object) -> str | None:
    """Return a record's id as printable text of bounded length; None if there is none."""
    if record_id is None:
        return None
    try:
        return _printable(str(record_id), _MAX_ID_LENGTH)
    except RecursionError:
        return "(nested too deeply)"


def _printable(text: str, max_length: int) -> str:
    if len(text) > max_length:
        text = f"{text[: max_length * 2 // 3]} ... {text[-max_length // 3 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
