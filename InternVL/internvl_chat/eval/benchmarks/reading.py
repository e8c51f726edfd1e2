"""Helpers of the benchmark readers; all problems of a benchmark are collected and reported together."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from internvl_chat.constants import IMG_CONTEXT
from internvl_chat.data.sources.dialects import control_tokens, misplaced_image
from internvl_chat.data.sources.image_names import describe_missing, describe_remote
from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.eval.benchmarks.item import Figure, Item
from internvl_chat.utils.errors import DataError, format_problems
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

_MAX_PROBLEMS_SHOWN = 20


def read_items(files: Iterable[tuple[RecordFile, Callable[[Mapping[str, Any]], Item]]]) -> list[Item]:
    """Parse all objects of some files, and index the items of each task from 0.

    Args:
        files: each file with a function that parses one object and raises `DataError` for an invalid one.

    Raises:
        DataError: objects are invalid; lists them with file and line.
    """
    items: list[Item] = []
    problems: list[str] = []
    for file, parse in files:
        marked: list[int] = []
        for number in range(len(file)):
            try:
                raw = file[number]
                if not isinstance(raw, Mapping):
                    raise DataError(f"an item must be a JSON object, found {type(raw).__name__}")
                items.append(parse(raw))
                if control_tokens(f"{items[-1].question}\n{items[-1].reference}"):
                    marked.append(file.line(number))
            except DataError as error:
                line, message = file.line(number), error.message
                if len(file) > 1 and line == file.line(number - 1):  # several objects on one line
                    message = f"object {number + 1} of the file: {message}"
                problems.append(str(DataError(message, file=file.path, line=line)))
        if marked:
            logger.warning(
                "%s: %d questions or answers contain control tokens such as <|im_end|>, e.g. in line %d; "
                "--escape_control_tokens True reads them as text", file.path, len(marked), marked[0],
            )  # fmt: skip
    raise_problems(problems)
    return with_indices(items)


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one error for all problems, if there are any.

    Raises:
        DataError: lists the first twenty problems and the number of the others.
    """
    if problems:
        shown = list(problems[:_MAX_PROBLEMS_SHOWN])
        if len(problems) > _MAX_PROBLEMS_SHOWN:
            shown.append(f"and {len(problems) - _MAX_PROBLEMS_SHOWN:,} more")
        raise DataError(format_problems(shown))


def split_mixed_tasks(items: Sequence[Item]) -> list[Item]:
    """Split tasks that mix open and multiple-choice questions, and group the items by task.

    The metrics of the two kinds have the same names but different meanings.
    """
    mixed = {item.task for item in items if item.choices} & {item.task for item in items if not item.choices}
    renamed = [
        item if item.choices or item.task not in mixed else replace(item, task=f"{item.task} (open)")
        for item in items
    ]
    order = {task: number for number, task in enumerate(dict.fromkeys(item.task for item in renamed))}
    return with_indices(sorted(renamed, key=lambda item: order[item.task]))


def with_indices(items: Iterable[Item]) -> list[Item]:
    """Return the items with their indices in their tasks."""
    counts: Counter[str] = Counter()
    result = []
    for item in items:
        result.append(replace(item, index=counts[item.task]))
        counts[item.task] += 1
    return result


def required_strings(raw: Mapping[str, Any], *keys: str) -> list[str]:
    """Return the strings under the given keys.

    Raises:
        DataError: a value is missing, empty or not a string.
    """
    invalid = [key for key in keys if not isinstance(raw.get(key), str) or not raw[key].strip()]
    if invalid:
        raise DataError(f"an item needs a non-empty string under {', '.join(map(repr, invalid))}")
    for key in keys:
        check_reserved_token(raw[key])
    return [raw[key] for key in keys]


def string_list(raw: Mapping[str, Any], key: str) -> list[str]:
    """Return the list of strings under a key; accepts a single string and a missing key.

    Raises:
        DataError: the value is of another type.
    """
    value = raw.get(key) or []
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise DataError(f"{key!r} must be a list of non-empty strings")
    check_reserved_token("".join(value))
    return value


def check_images(raw: Mapping[str, Any], read: Sequence[str], names: Sequence[str], question: str) -> None:
    """Refuse an item with an image that is named under another key or marked in another dialect.

    Args:
        raw: the item as the file has it.
        read: keys that are read.
        names: the images that are read.
        question: the question.

    Raises:
        DataError: an image would not be shown, or not at its position.
    """
    if problem := misplaced_image(raw, read, names, question):
        raise DataError(problem)


def check_reserved_token(text: str) -> None:
    """Reject text that contains the image context token.

    Raises:
        DataError: the text contains the token.
    """
    if IMG_CONTEXT in text:
        raise DataError(f"the text contains the reserved token {IMG_CONTEXT}")


def find_image(name: str, roots: Sequence[Path]) -> Path:
    """Return the image file in the first of the folders that has it.

    Raises:
        DataError: no folder has it.
    """
    if remote := describe_remote(name):
        raise DataError(remote)
    for root in roots:
        if (path := root / name).is_file():
            return path
    reason = next(filter(None, (describe_missing(root / name) for root in roots)), None)
    folders = ", ".join(dict.fromkeys(str(root) for root in roots if root.is_dir()))
    more = f"; {reason}" if reason else ""
    raise DataError(f"the image {name} is not in {folders or 'any image folder'}{more}")


def correct_letter(answer: str, choices: Sequence[str]) -> str:
    """Return the letter of the correct option, given as a letter or as the text of the option.

    Raises:
        DataError: the answer is neither, or there are more options than letters.
    """
    if len(choices) > len(ascii_uppercase):
        raise DataError(f"{len(choices)} options, more than the {len(ascii_uppercase)} letters")
    letters = list(ascii_uppercase[: len(choices)])
    if answer.strip().upper() in letters:
        return answer.strip().upper()
    for letter, choice in zip(letters, choices, strict=True):
        if choice.strip().lower() == answer.strip().lower():
            return letter
    raise DataError(f"the correct answer {answer!r:.80} is none of the {len(choices)} options")


def choice_item(
    task: str, question: str, answer: str, figures: tuple[Figure, ...], choices: Sequence[str]
) -> Item:
    """Return a multiple-choice item whose options are listed after the question, one per line."""
    options = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)]
    text = "\n".join([question, *options])
    return Item(task, 0, text, correct_letter(answer, choices), figures, tuple(choices))
