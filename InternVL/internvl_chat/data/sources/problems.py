"""Kinds of problems with records and images, each with an explanation and a remedy."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

# Errors: the record is unusable.
ERRORS = {
    "file": "The annotation file cannot be read or is not a file of records.",
    "json": "The line is not valid JSON, or an object in it has the same key twice.",
    "encoding": "The text is not valid UTF-8.",
    "line too long": "The line exceeds the size limit of a record.",
    "structure": "The record is not an object with a conversation, or one of its values has the wrong type.",
    "role": "A message has an unknown role or is in the wrong position, or there is no assistant message.",
    "empty answer": "All answers are empty, so no token is supervised.",
    "placeholders": "The number of <image> placeholders does not match the number of images.",
    "image missing": "An image file does not exist. The entire record is excluded: without this image, the "
    "others would move to the wrong placeholders.",
    "unsupported media": "An unsupported key or tag refers to an image, a video or audio.",
    "image outside root": "A relative image path points outside the dataset's root.",
    "image unreadable": "An image file is empty, truncated, or not an image.",
    "image depth": "An image has more than 8 bits per channel or signed pixel values: convert it first.",
    "image too large": "An image exceeds the pixel limit.",
    "too long": "The record exceeds max_seq_length, even with one tile per image.",
    "changed": "The record has changed since its length was computed.",
}

# Warnings: reported, but the record is used.
WARNINGS = {
    "fewer tiles": "Images are split into fewer tiles than allowed, so that the record fits max_seq_length.",
    "text truncated": "The end of the text is truncated to fit max_seq_length (--truncate_text True).",
    "empty message": "A question or an answer is empty, or its text is a missing value such as nan.",
    "message order": "Questions and answers do not alternate: one is missing, or they are out of order.",
    "placeholder in answer": "An answer contains <image>, which is trained on as plain text.",
    "unsupported placeholder": "Another framework's placeholder, or <image> in a system message, is treated "
    "as text.",
    "control token": "A message contains a control token such as <|im_end|>, which starts or ends a message.",
    "ignored field": "A field that other frameworks interpret is ignored.",
    "ignored file": "An ignored field refers to an existing image file.",
    "multiple frames": "A file has multiple pages or frames; only the first is used.",
    "transparency": "Transparency is dropped (--image_background white shows it on white).",
    "color depth": "An image has more than 8 bits per channel; the lower bits are dropped.",
    "exif rotation": "The EXIF rotation is not applied (--exif_transpose True applies it).",
    "duplicate id": "Another record of the same dataset has the same id.",
    "duplicate record": "Another record has the same conversation and images.",
    "not compared": "Part of a benchmark could not be read, so the records were not compared with it.",
    "no records": "'repeat_time' is so small that it selects none of the dataset's records.",
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
    "line too long": "Delete the line, or split it into multiple records.",
    "structure": "Write the record as documented, with 'conversations' or 'messages'.",
    "role": "Use the roles system, human and gpt, in this order, with at least one answer.",
    "empty answer": "Add an answer, or delete the record.",
    "placeholders": "Write one <image> in a question for each image of the record.",
    "image missing": "Copy the image to this path, or correct 'root' in the meta file.",
    "unsupported media": "List the image under 'image' or 'images', with one <image> in a question.",
    "image outside root": "Set 'root' in the meta file to a folder that contains all images.",
    "image unreadable": "Copy or download the image again, or delete the record.",
    "image depth": "Convert the image to 8 bits per channel with a suitable intensity window.",
    "image too large": "Reduce the size of the image.",
    "too long": "Raise --max_seq_length, shorten the text, or pass --truncate_text True.",
    "changed": "Run the command again to recompute the length of the record.",
    "fewer tiles": "Raise --max_seq_length if image details matter.",
    "text truncated": "Raise --max_seq_length, or shorten the text.",
    "empty message": "Add the missing text, or delete these messages.",
    "message order": "Check that no question or answer was lost.",
    "placeholder in answer": "Remove <image> from the answer, or move it to the question.",
    "unsupported placeholder": "Write <image> where the model should see the image, or rephrase the text.",
    "control token": "Rephrase the text, or pass --escape_control_tokens True.",
    "ignored field": "Remove the field, or move its content to the conversation.",
    "ignored file": "List the image under 'image' or 'images' if the model should see it.",
    "multiple frames": "Save the relevant pages or frames as separate images.",
    "transparency": "None if the image looks right without it; otherwise pass --image_background white.",
    "color depth": "None if 8 bits are enough; otherwise convert the image with a suitable intensity window.",
    "exif rotation": "Pass --exif_transpose True, or save the image rotated.",
    "duplicate id": "None unless both should be the same record; ids do not affect training.",
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
    """A record is unusable. Callers that know its file, line and id convert this to a `DataError`.

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
        index: index of the record in its file; None for a problem of the entire file.
        line: 1-based line number at which the record begins.
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
        """Whether the record is unusable."""
        return self.kind in ERRORS

    def __str__(self) -> str:
        location = f"{self.file}" + (f", line {self.line}" if self.line is not None else "")
        return f"{location}{f' (record {self.id!r})' if self.id is not None else ''}: {self.message}"


def describe_by_kind(problems: Iterable[Problem]) -> list[str]:
    """Return one line per dataset and kind of problem, with the number of records and an example."""
    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.dataset, problem.kind), []).append(problem)
    lines = []
    for (dataset, kind), group in groups.items():
        count = "1 record: " if len(group) == 1 else f"{len(group):,} records, for example: "
        lines.append(f"dataset {dataset}: {kind}: {'' if group[0].index is None else count}{group[0]}")
    return lines


def printable_message(text: str) -> str:
    """Return a message with limited length and escaped control characters.

    Messages quote untrusted data, which may contain control characters and lone surrogates.
    """
    return _printable(text, _MAX_MESSAGE_LENGTH)


def printable_id(record_id: object) -> str | None:
    """Return a record's id as printable text of limited length; None if it has no id."""
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
