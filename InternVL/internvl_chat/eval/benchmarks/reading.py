"""What the readers of benchmarks share: every item is checked first, and all faults are named at once."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from internvl_chat.constants import IMG_CONTEXT
from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.eval.benchmarks.item import Item
from internvl_chat.utils.errors import DataError, format_problems

_MOST_SHOWN = 20


def read_items(files: Iterable[tuple[RecordFile, Callable[[Mapping[str, Any]], Item]]]) -> list[Item]:
    """Parse every object of some files, and number the items of each task from 0 in their order.

    Args:
        files: each with the function that makes an item of an object, or raises `DataError`.

    Raises:
        DataError: objects cannot be used; names them all with file and line.
    """
    items: list[Item] = []
    problems: list[str] = []
    for file, parse in files:
        for number in range(len(file)):
            try:
                raw = file[number]
                if not isinstance(raw, Mapping):
                    raise DataError(f"an item must be a JSON object, found {type(raw).__name__}")
                items.append(parse(raw))
            except DataError as error:
                line, message = file.line(number), error.message
                if len(file) > 1 and line == file.line(number - 1):  # as in an array that is one line
                    message = f"object {number + 1} of the file: {message}"
                problems.append(str(DataError(message, file=file.path, line=line)))
    refuse(problems)
    return numbered(items)


def refuse(problems: Sequence[str]) -> None:
    """Raise an error of all problems, if there are any.

    Raises:
        DataError: names the first twenty, and how many more there are.
    """
    if problems:
        shown = list(problems[:_MOST_SHOWN])
        if len(problems) > _MOST_SHOWN:
            shown.append(f"and {len(problems) - _MOST_SHOWN:,} more")
        raise DataError(format_problems(shown))


def apart(items: Iterable[Item]) -> list[Item]:
    """Return items task by task, open questions apart from multiple choice.

    A task that has both becomes two: their figures have the same names and mean different things.
    """
    items = list(items)
    mixed = {item.task for item in items if item.choices} & {item.task for item in items if not item.choices}
    named = [
        item if item.choices or item.task not in mixed else replace(item, task=f"{item.task} (open)")
        for item in items
    ]
    place = {task: number for number, task in enumerate(dict.fromkeys(item.task for item in named))}
    return numbered(sorted(named, key=lambda item: place[item.task]))


def numbered(items: Iterable[Item]) -> list[Item]:
    """Return items with their numbers in their tasks."""
    counts: Counter[str] = Counter()
    result = []
    for item in items:
        result.append(replace(item, index=counts[item.task]))
        counts[item.task] += 1
    return result


def text_under(raw: Mapping[str, Any], *keys: str) -> list[str]:
    """Return the texts under some keys.

    Raises:
        DataError: one is missing, empty or no text.
    """
    absent = [key for key in keys if not isinstance(raw.get(key), str) or not raw[key].strip()]
    if absent:
        raise DataError(f"an item needs text under {', '.join(map(repr, absent))}")
    for key in keys:
        check_text(raw[key])
    return [raw[key] for key in keys]


def texts_under(raw: Mapping[str, Any], key: str) -> list[str]:
    """Return the list of texts under a key; a single text is a list of one, and nothing an empty one.

    Raises:
        DataError: something else is there.
    """
    found = raw.get(key) or []
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(text, str) and text for text in found):
        raise DataError(f"{key!r} must be a list of texts")
    check_text("".join(found))
    return found


def check_text(text: str) -> None:
    """Refuse a text with the token that stands for images.

    Raises:
        DataError: it is in the text.
    """
    if IMG_CONTEXT in text:
        raise DataError(f"the text contains the reserved token {IMG_CONTEXT}")


def find_image(name: str, roots: Sequence[Path]) -> Path:
    """Return the first file of a name under some folders.

    Raises:
        DataError: there is none.
    """
    for root in roots:
        if (path := root / name).is_file():
            return path
    folders = ", ".join(dict.fromkeys(str(root) for root in roots if root.is_dir()))
    raise DataError(f"the image {name} is not in {folders or 'any folder of images'}")


def list_options(choices: Sequence[str]) -> str:
    """Return options a line each with their letters."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))


def right_letter(answer: str, choices: Sequence[str]) -> str:
    """Return the letter of the right option, which a benchmark gives as a letter or as the option's text.

    Raises:
        DataError: it is neither, or there are more options than letters.
    """
    if len(choices) > len(ascii_uppercase):
        raise DataError(f"{len(choices)} options, more than the {len(ascii_uppercase)} letters")
    letters = list(ascii_uppercase[: len(choices)])
    if answer.strip().upper() in letters:
        return answer.strip().upper()
    for letter, choice in zip(letters, choices, strict=True):
        if choice.strip().lower() == answer.strip().lower():
            return letter
    raise DataError(f"the right answer {answer!r:.80} is none of the {len(choices)} options")
