"""Find the correct option of a multiple-choice item, which a benchmark gives as a letter or as option text.

An answer such as `A` is ambiguous if it is the letter of the first option and the text of a different one. If
the unambiguous answers of the same file and task are all letters, it is read as a letter; if they are all
option text, as text. Otherwise, the item is rejected.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import Literal

from internvl_chat.eval.benchmarks.item import Item
from internvl_chat.utils.errors import DataError

AnswerForm = Literal["letter", "text"]

# `A. text`, `(A) text`, `A) text`, `A: text`.
_LETTERED = re.compile(r"\s*\(?([A-Z])[.):]\s*(\S.*)", re.DOTALL)


def strip_letters(choices: Sequence[str]) -> list[str]:
    """Remove the leading letters if every option begins with its letter.

    >>> strip_letters(["A. yes", "B. no"]), strip_letters(["A. fumigatus", "C. albicans"])
    (['yes', 'no'], ['A. fumigatus', 'C. albicans'])

    Raises:
        DataError: the options begin with the expected letters in a different order.
    """
    lettered = [_LETTERED.fullmatch(choice) for choice in choices]
    letters = [match[1] for match in lettered if match]
    expected = list(ascii_uppercase[: len(choices)])
    if len(choices) < 2 or sorted(letters) != expected:
        return list(choices)
    if letters != expected:
        raise DataError(
            f"the options begin with the letters {', '.join(letters)}; list them in alphabetical order"
        )
    return [match[2].strip() for match in lettered if match]


def is_repeated(letter: str, choices: Sequence[str]) -> bool:
    """Return whether the text of the option with this letter occurs in another option as well."""
    texts = [_plain(choice) for choice in choices]
    return texts.count(texts[ascii_uppercase.index(letter)]) > 1


def options_like_letters(choices: Sequence[str]) -> bool:
    """Return whether the text of an option is the letter of a different one (such as `B. A`)."""
    letters = ascii_uppercase[: len(choices)]
    return any(
        len(text := choice.strip().upper()) == 1 and text in letters and text != letter
        for letter, choice in zip(letters, choices, strict=False)
    )


def names_option(answer: str, choices: Sequence[str]) -> bool:
    """Return whether an answer names an option by its letter, its text, or both (`B`, `(B)`, `B. text`)."""
    return bool(_readings(answer, choices))


def common_form(items: Iterable[Item]) -> AnswerForm | None:
    """Return the form of the unambiguous answers (letter or text), or None if they do not share one."""
    forms: set[AnswerForm] = set()
    for item in items:
        readings = _readings(item.reference, item.choices)
        if len(readings) == 1:
            forms |= readings.keys()
    return forms.pop() if len(forms) == 1 else None


def with_letter(item: Item, form: AnswerForm | None, answer_key: str) -> Item:
    """Return a multiple-choice item with the letter of its correct option as reference.

    Open items are returned unchanged.

    Args:
        item: item whose reference is the answer as given in the benchmark.
        form: form of the answers in the benchmark; None if unknown.
        answer_key: JSON key of the answer, for error messages.

    Raises:
        DataError: the answer is missing, is ambiguous or is not an option, or there are more than 26 options.
    """
    if not item.reference:
        raise DataError(
            f"expected a non-empty string for {answer_key!r}, because other items of the task have one"
        )
    if not item.choices:
        return item
    return replace(item, reference=correct_letter(item.reference, item.choices, form))


def correct_letter(answer: str, choices: Sequence[str], form: AnswerForm | None = None) -> str:
    """Return the letter of the correct option.

    Args:
        answer: correct answer, given as a letter, as option text, or as both (`B. text`).
        choices: text of each option.
        form: how to read an answer that is a letter and also the text of a different option.

    Raises:
        DataError: see `with_letter`.
    """
    if len(choices) > len(ascii_uppercase):
        raise DataError(f"{len(choices)} options; at most {len(ascii_uppercase)} (A to Z) are supported")
    readings = _readings(answer, choices)
    if not readings:
        raise DataError(f"the correct answer {answer!r:.80} is not one of the {len(choices)} options")
    letters = set(readings.values())
    if len(letters) == 1:
        return letters.pop()
    if form is None:
        letter, text = readings["letter"], readings["text"]
        raise DataError(
            f"the correct answer {answer!r} is ambiguous: it is the letter of option {letter} and the text "
            f'of option {text}; write both letter and text, for example "{text}. {answer.strip()}"'
        )
    return readings[form]


def _readings(answer: str, choices: Sequence[str]) -> dict[AnswerForm, str]:
    """Return the letter of the option that an answer refers to, for each form in which it can be read."""
    letters = ascii_uppercase[: len(choices)]
    plain = answer.strip()
    texts = {_plain(choice): letter for letter, choice in reversed(list(zip(letters, choices, strict=False)))}
    readings: dict[AnswerForm, str] = {}
    letter = plain.strip("().: ").upper()
    if len(letter) == 1 and letter in letters:
        readings["letter"] = letter
    by_text = texts.get(_plain(plain))
    if by_text is None and (both := _LETTERED.fullmatch(plain)) and texts.get(_plain(both[2])) == both[1]:
        by_text = both[1]
    if by_text is not None:
        readings["text"] = by_text
    return readings


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip().lower()
