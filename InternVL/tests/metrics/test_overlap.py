"""Exact match and word overlap."""

import pytest

from internvl_chat.metrics.overlap import exact_match, word_overlap


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("a b c", "B c d e", (2 / 3, 2 / 4)),
        ("a a a", "a", (1, 1)),
        ("Same text.", "same TEXT.", (1, 1)),
        ("left", "left.", (0, 0)),
        ("", "a", (0, 0)),
        ("a", "", (0, 0)),
        ("", "", (0, 0)),
        ("größe Ä", "Größe ä b", (1, 2 / 3)),
    ],
)
def test_word_overlap(answer, reference, expected):
    precision, recall = expected
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
    scores = word_overlap(answer, reference)
    assert scores == pytest.approx({"precision": precision, "recall": recall, "f1": f1}, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        (" Yes\n", "yes", 1),
        ("yes.", "yes", 0),
        ("", "", 1),
        ("", "a", 0),
        ("GRÖSSE", "größe", 0),
        ("Ä", "ä", 1),
    ],
)
def test_exact_match(answer, reference, expected):
    assert exact_match(answer, reference) == expected
