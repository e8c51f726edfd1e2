"""Helpers for the benchmark readers. All problems of a benchmark are reported together."""

import filecmp
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from internvl_chat.constants import IMG_CONTEXT
from internvl_chat.data.sources.dialects import control_tokens, misplaced_image
from internvl_chat.data.sources.image_names import describe_missing, describe_remote
from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.eval.benchmarks.answers import (
    AnswerForm,
    common_form,
    is_repeated,
    options_like_letters,
    strip_letters,
    with_letter,
)
from internvl_chat.eval.benchmarks.item import Figure, Item
from internvl_chat.utils.errors import DataError, format_problems
from internvl_chat.utils.logging import get_logger
from internvl_chat.utils.text import counted

logger = get_logger(__name__)

_MAX_PROBLEMS_SHOWN = 20
# Keys under which other formats store the options, and text that belongs to the prompt.
_OPTION_KEY = re.compile(
    r"(?:answer_?|multiple_?)?(?:options?|choices?|candidates?)|candidate_?answers|"
    r"(?:option|choice|candidate)[ _-]?(?:[a-z]|\d+)|op[a-e]|[a-f]",
    re.IGNORECASE,
)
_PROMPT_KEY = re.compile(
    r"contexts?|hints?|passages?|lectures?|instructions?|system(?:_?(?:prompt|message))?", re.IGNORECASE
)


@dataclass(frozen=True)
class Request:
    """Parts of a benchmark to read.

    Attributes:
        tasks: tasks to read if the benchmark has one file per task; None for all tasks.
        images: whether the image files must exist.
    """

    tasks: Collection[str] | None = None
    images: bool = True

    def wants(self, task: str) -> bool:
        """Return whether a task is requested."""
        return self.tasks is None or task in self.tasks


EVERYTHING = Request()


@dataclass(frozen=True)
class Row:
    """Unparsed row of a benchmark file.

    Attributes:
        read: function that returns the JSON value; raises `DataError` if it is not valid JSON.
        file: benchmark file.
        place: function that returns the location for error messages, such as `line 3`.
    """

    read: Callable[[], Any]
    file: Path
    place: Callable[[], str]

    def locate(self, message: str) -> str:
        """Prefix an error message with the file and the location."""
        return f"{self.file}, {self.place()}: {message}"


@dataclass(frozen=True)
class Format:
    """Format of the rows of a benchmark.

    Attributes:
        parse: function that converts a JSON object to an item; raises `DataError` if the object is invalid.
            In a multiple-choice item, the reference is the answer as given, or empty if there is none.
        task: function that returns the task of an object, which may be invalid; "" if unknown.
        answer_key: JSON key of the answer.
        answers: form of multiple-choice answers; None if the form differs between files.
    """

    parse: Callable[[Mapping[str, Any]], Item]
    task: Callable[[Mapping[str, Any]], str]
    answer_key: str
    answers: AnswerForm | None = None


def file_rows(file: RecordFile) -> Iterator[Row]:
    """Yield one row per object in a JSONL file or a JSON array."""
    for number in range(len(file)):

        def place(number: int = number) -> str:
            line = file.line(number)
            several = len(file) > 1 and line == file.line(number - 1)
            return f"line {line}" + (f": object {number + 1} of the file" if several else "")

        yield Row(partial(file.__getitem__, number), file.path, place)


def read_rows(rows: Iterable[Row], rule: Format) -> list[Item]:
    """Parse rows into items; an invalid row becomes an item with a `problem`.

    The reference of a multiple-choice item becomes an option letter. If any row of a task has an answer, all
    must have one.
    """
    rows = list(rows)
    parsed = [_parse(row, rule) for row in rows]
    by_task: dict[str, list[Item]] = defaultdict(list)
    for item in parsed:
        if not item.problem:
            by_task[item.task].append(item)
    forms = {task: rule.answers or common_form(items) for task, items in by_task.items()}
    labeled = {task for task, items in by_task.items() if any(item.reference for item in items)}
    result = []
    for row, item in zip(rows, parsed, strict=True):
        try:
            if item.task in labeled and not item.problem:
                item = with_letter(item, forms[item.task], rule.answer_key)
        except DataError as error:
            item = replace(item, problem=row.locate(error.message))
        result.append(item)
    marked = [row for row, item in zip(rows, result, strict=True) if not item.problem and _is_marked(item)]
    if marked:
        logger.warning(
            "%s: %d questions or answers contain control tokens such as <|im_end|>, e.g. in %s; "
            "--escape_control_tokens True keeps them as text", marked[0].file, len(marked), marked[0].place(),
        )  # fmt: skip
    return with_indices(result)


def _is_marked(item: Item) -> bool:
    """Return whether the question or the answer contains control tokens."""
    return bool(control_tokens(f"{item.question}\n{item.reference}"))


def _parse(row: Row, rule: Format) -> Item:
    raw = None
    try:
        raw = row.read()
        if not isinstance(raw, Mapping):
            raise DataError(f"an item must be a JSON object, found {type(raw).__name__}")
        return rule.parse(raw)
    except DataError as error:
        known = raw if isinstance(raw, Mapping) else {}
        choices = ("",) if known.get("choices") else ()
        return Item(rule.task(known), 0, "", "", choices=choices, problem=row.locate(error.message))


def raise_problems(problems: Sequence[str], advice: Sequence[str] = ()) -> None:
    """Raise one error that lists all problems; do nothing if there are none.

    Args:
        problems: one message per problem.
        advice: lines to add after the list.

    Raises:
        DataError: there is a problem; the message lists the first 20 and counts the rest.
    """
    if problems:
        raise DataError("\n".join([format_problems(_first(problems)), *advice]))


def skipped_message(problems: Sequence[str], total: int) -> str:
    """Return a log message that counts the skipped items and lists the first 20."""
    lines = [f"  {problem}" for problem in _first(problems)]
    return "\n".join([f"skipped {len(problems):,} of {counted(total, 'item')}:", *lines])


def _first(problems: Sequence[str]) -> list[str]:
    """Return the first 20 problems, and a line that counts the rest."""
    rest = len(problems) - _MAX_PROBLEMS_SHOWN
    return list(problems[:_MAX_PROBLEMS_SHOWN]) + ([f"and {rest:,} more"] if rest > 0 else [])


def unknown_tasks(unknown: Sequence[str], benchmark: str, known: Iterable[str]) -> str:
    """Return the error message for unknown names in `--tasks`."""
    return f"--tasks {','.join(unknown)}: unknown; the tasks of {benchmark} are {', '.join(known)}"


def split_mixed_tasks(items: Sequence[Item]) -> list[Item]:
    """Move the open questions of each mixed task to a separate task `TASK (open)`; group the items by task.

    A mixed task has both open and multiple-choice questions. It is split, because some metrics have the same
    name but different definitions for the two types of questions.
    """
    usable = [item for item in items if not item.problem]
    mixed = {item.task for item in usable if item.choices} & {
        item.task for item in usable if not item.choices
    }
    renamed = [
        item if item.choices or item.task not in mixed else replace(item, task=f"{item.task} (open)")
        for item in items
    ]
    order = {task: number for number, task in enumerate(dict.fromkeys(item.task for item in renamed))}
    return with_indices(sorted(renamed, key=lambda item: order[item.task]))


def with_indices(items: Iterable[Item]) -> list[Item]:
    """Return the items with an `index` that counts from 0 in each task."""
    counts: Counter[str] = Counter()
    result = []
    for item in items:
        result.append(replace(item, index=counts[item.task]))
        counts[item.task] += 1
    return result


def required_strings(raw: Mapping[str, Any], *keys: str) -> list[str]:
    """Return the string values of the given keys.

    Raises:
        DataError: a value is missing, empty or not a string, or contains the reserved image context token.
    """
    invalid = [key for key in keys if not isinstance(raw.get(key), str) or not raw[key].strip()]
    if invalid:
        raise DataError(f"expected a non-empty string for {', '.join(map(repr, invalid))}")
    for key in keys:
        check_reserved_token(raw[key])
    return [raw[key] for key in keys]


def optional_string(raw: Mapping[str, Any], key: str) -> str:
    """Return the string value of a key, or "" if the key is missing or null.

    Raises:
        DataError: the value is empty or not a string.
    """
    return "" if raw.get(key) is None else required_strings(raw, key)[0]


def string_list(raw: Mapping[str, Any], key: str) -> list[str]:
    """Return the list of strings under a key. A single string becomes a list; a missing key results in [].

    Raises:
        DataError: the value is neither a string nor a list of non-empty strings, or contains the reserved
            image context token.
    """
    value = raw.get(key) or []
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise DataError(f"{key!r} must be a list of non-empty strings")
    check_reserved_token("".join(value))
    return value


def check_images(raw: Mapping[str, Any], read: Sequence[str], names: Sequence[str], question: str) -> None:
    """Reject an item that contains an image under an unsupported key, or an unsupported image placeholder.

    Args:
        raw: unparsed item.
        read: supported keys.
        names: images of the item.
        question: text of the question.

    Raises:
        DataError: an image would be dropped or misplaced.
    """
    if problem := misplaced_image(raw, read, names, question):
        raise DataError(problem)


def check_keys(raw: Mapping[str, Any], read: Sequence[str]) -> None:
    """Reject an item that contains options or text for the prompt under an unsupported key.

    Args:
        raw: unparsed item.
        read: supported keys.

    Raises:
        DataError: a part of the question would be ignored.
    """
    others = [key for key, value in raw.items() if key not in read and value not in (None, "", [], {})]
    if options := [key for key in others if _OPTION_KEY.fullmatch(key)]:
        remedy = (
            "put them in a list 'choices'"
            if "choices" in read
            else "put them in the question (A. ... B. ...)"
        )
        raise DataError(f"the options in {', '.join(map(repr, options))} would be ignored; {remedy}")
    if texts := [key for key in others if _PROMPT_KEY.fullmatch(key)]:
        raise DataError(
            f"the text in {', '.join(map(repr, texts))} would be ignored; put it in the "
            "question, or remove the key"
        )


def check_reserved_token(text: str) -> None:
    """Reject text that contains the reserved image context token.

    Raises:
        DataError: the text contains the token.
    """
    if IMG_CONTEXT in text:
        raise DataError(f"the text contains the reserved token {IMG_CONTEXT}")


def find_image(name: str, roots: Sequence[Path], *, required: bool = True) -> Path:
    """Return the path to an image, in the first of several folders that contains it.

    If no folder contains it and it is not required, return its path in the first folder.

    Args:
        name: image path relative to one of the folders.
        roots: folders to search.
        required: whether the image must exist.

    Raises:
        DataError: a required image is remote, missing, or ambiguous (different files in two folders).
    """
    if required and (remote := describe_remote(name)):
        raise DataError(remote)
    found = [path for root in roots if (path := root / name).is_file()]
    if found:
        first, *others = found
        different = [path for path in others if not path.samefile(first) and not _equal(path, first)]
        if required and different:
            raise DataError(f"{first} and {different[0]} are different images of the same name; remove one")
        return first
    if not required:
        return roots[0] / name
    reason = next(filter(None, (describe_missing(root / name) for root in roots)), None)
    folders = ", ".join(dict.fromkeys(str(root) for root in roots if root.is_dir()))
    more = f"; {reason}" if reason else ""
    raise DataError(f"the image {name} is not in {folders or 'any image folder'}{more}")


def _equal(one: Path, other: Path) -> bool:
    """Return whether two files have the same content."""
    return one.stat().st_size == other.stat().st_size and filecmp.cmp(one, other, shallow=False)


def choice_item(
    task: str, question: str, answer: str, figures: tuple[Figure, ...], choices: Sequence[str]
) -> Item:
    """Return a multiple-choice item; its options follow the question, one per line, with letters.

    If all options already begin with their letters (`A. yes`, `B. no`), no letters are added.

    Raises:
        DataError: the options begin with the expected letters in a different order.
    """
    texts = strip_letters(choices)
    options = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, texts, strict=False)]
    return Item(task, 0, "\n".join([question, *options]), answer, figures, tuple(texts))


def warn_about_options(items: Sequence[Item]) -> None:
    """Warn about repeated correct options, and options whose text is the letter of a different option."""
    repeated = [
        item for item in items
        if item.choices and item.reference and is_repeated(item.reference, item.choices)
    ]  # fmt: skip
    letters = [item for item in items if options_like_letters(item.choices)]
    for found, message in (
        (repeated,
         "%s with a repeated correct option (for example %s %d); only the letter of the first occurrence is "
         "counted as correct, and the option text cannot be parsed"),
        (letters,
         "%s with an option whose text is the letter of a different option (for example %s %d); "
         "single-letter answers are interpreted as letters, not as option text"),
    ):  # fmt: skip
        if found:
            logger.warning(message, counted(len(found), "item"), *found[0].key)
