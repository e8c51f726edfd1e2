"""Exact match, and word-overlap F1, precision and recall."""

import re

_WORD = re.compile(r"\d+(?:\.\d+)+|\w+")
_ARTICLES = ("a", "an", "the")
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip


def normalize_words(text: str) -> str:
    """Lowercase a text, remove punctuation and articles, and write small numbers as digits (as in VQA).

    >>> normalize_words("The left-sided lesion (2.5 cm)."), normalize_words("Two")
    ('left sided lesion 2.5 cm', '2')
    """
    words = (_NUMBERS.get(word, word) for word in _WORD.findall(text.lower()))
    return " ".join(word for word in words if word not in _ARTICLES)


def exact_match(prediction: str, reference: str) -> float:
    """Return 1 if the strings match, ignoring case and surrounding whitespace, else 0."""
    return float(prediction.strip().lower() == reference.strip().lower())


def word_overlap(prediction: str, reference: str) -> dict[str, float]:
    """Return `f1`, `precision` and `recall` of the sets of lowercase words, split at whitespace.

    All three are 0 if the sets are disjoint.
    """
    predicted, expected = set(prediction.lower().split()), set(reference.lower().split())
    common = len(predicted & expected)
    if not common:
        return {"f1": 0.0, "precision": 0.0, "recall": 0.0}
    precision, recall = common / len(predicted), common / len(expected)
    return {"f1": 2 * precision * recall / (precision + recall), "precision": precision, "recall": recall}
