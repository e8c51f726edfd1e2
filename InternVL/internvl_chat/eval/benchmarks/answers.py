"""Correct options of multiple-choice items: a benchmark gives their letters or their texts.

An answer such as `A` may be both: the letter of the first option, and the text of another one. Then the other
answers of the same file and task decide, if all of them are letters or all of them are texts; otherwise the
item is refused.
"""

import re
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
    """Return the options without the letters that all of them begin with.

    >>> strip_letters(["A. yes", "B. no"]), strip_letters(["A. fumigatus", "C. albicans"])
    (['yes', 'no'], ['A. fumigatus', 'C. albicans'])

    Raises:
        DataError: they begin with the right letters in another order.
    """
    lettered = [_LETTERED.fullmatch(choice) for choice in choices]
    letters = [match[1] for match in lettered if match]
    expected = list(ascii_uppercase[: len(choices)])
    if len(choices) < 2 or sorted(letters) != expected:
        return list(choices)
    if letters != expected:
        raise DataError(
            f"the options begin with the letters {', '.join(letters)}; list them in the order of the alphabet"
        )
    return [match[2].strip() for match in lettered if match]


def options_like_letters(choices: Sequence[str]) -> bool:
    """Return whether any option's text is another option's letter (for example, option B reads 'A')."""
    letters = ascii_uppercase[: len(choices)]
    return any(
        len(text := choice.strip().upper()) == 1 and text in letters and text != letter
        for letter, choice in zip(letters, choices, strict=False)
    )


def common_form(items: Iterable[Item]) -> AnswerForm | None:
    """Return the form of all unambiguous answers; None if there are none, or of both forms."""
    forms: set[AnswerForm] = set()
    for item in items:
        readings = _readings(item.reference, item.choices)
        if len(readings) == 1:
            forms |= readings.keys()
    return forms.pop() if len(forms) == 1 else None


def with_letter(item: Item, form: AnswerForm | None, answer_key: str) -> Item:
    """Return an item with the letter of its correct option as the reference; open items are not changed.

    Args:
        item: item whose reference is the answer as the benchmark gives it.
        form: form of the benchmark's answers; None if unknown.
        answer_key: key of the answer, for the error message.

    Raises:
        DataError: there is no answer, it is ambiguous or no option, or there are more options than letters.
    """
    if not item.reference:
        raise DataError(
            f"an item needs a non-empty string under {answer_key!r}, like other items of its task"
        )
    if not item.choices:
        return item
    return replace(item, reference=correct_letter(item.reference, item.choices, form))


def correct_letter(answer: str, choices: Sequence[str], form: AnswerForm | None = None) -> str:
    """Return the letter of the correct option, given as a letter, as its text, or as both (`B. text`).

    Args:
        answer: the correct answer.
        choices: texts of the options.
        form: how to read an answer that is both a letter and the text of another option.

    Raises:
        DataError: see `with_letter`.
    """
    if len(choices) > len(ascii_uppercase):
        raise DataError(f"{len(choices)} options, more than the {len(ascii_uppercase)} letters")
    readings = _readings(answer, choices)
    if not readings:
        raise DataError(f"the correct answer {answer!r:.80} is none of the {len(choices)} options")
    letters = set(readings.values())
    if len(letters) == 1:
        return letters.pop()
    if form is None:
        letter, text = readings["letter"], readings["text"]
        raise DataError(
            f"the correct answer {answer!r} is ambiguous: it is the letter of option {letter}, and the text "
            f'of option {text}; write letter and text, for example "{text}. {answer.strip()}"'
        )
    return readings[form]


def _readings(answer: str, choices: Sequence[str]) -> dict[AnswerForm, str]:
    """Return the letter of the option that an answer means, as a letter and as a text."""
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
    return text.strip().lower()
