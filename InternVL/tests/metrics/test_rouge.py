"""ROUGE compared with the definition in the package."""

import sys

import pytest
from answer_pairs import IDS, PAIRS

from internvl_chat.metrics.rouge import rouge


def lcs(first: list[str], second: list[str]) -> set[str]:
    """Return the words of a longest common subsequence; ties are resolved from the end, as in the package."""
    rows = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first, 1):
        for j, b in enumerate(second, 1):
            rows[i][j] = rows[i - 1][j - 1] + 1 if a == b else max(rows[i - 1][j], rows[i][j - 1])
    words, i, j = set(), len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            words.add(first[i - 1])
            i, j = i - 1, j - 1
        elif rows[i - 1][j] > rows[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def f_score(common: int, predicted: int, expected: int) -> float:
    # The package adds 1e-8 to the denominator.
    precision, recall = (common / predicted if predicted else 0), (common / expected if expected else 0)
    return 2 * precision * recall / (precision + recall + 1e-8)


def expected_rouge(answer: str, reference: str) -> dict[str, float]:
    """Use n-gram sets over all sentences; for ROUGE-L, the union of the common subsequences per sentence."""
    sentences = [[s.split() for s in text.lower().split(".") if s] for text in (answer, reference)]
    predicted, expected = ([word for s in side for word in s] for side in sentences)
    if not predicted or not expected:
        return {"rouge1": 0, "rouge2": 0, "rougeL": 0}
    scores = {}
    for n in (1, 2):
        grams = [{tuple(side[i : i + n]) for i in range(len(side) - n + 1)} for side in (predicted, expected)]
        scores[f"rouge{n}"] = f_score(len(grams[0] & grams[1]), len(grams[0]), len(grams[1]))
    union = {word for r in sentences[1] for s in sentences[0] for word in lcs(r, s)}
    scores["rougeL"] = f_score(len(union), len(set(predicted)), len(set(expected)))
    return scores


@pytest.mark.parametrize(("answer", "reference"), PAIRS, ids=IDS)
def test_rouge(answer, reference):
    assert rouge(answer, reference) == pytest.approx(expected_rouge(answer, reference), abs=1e-6)


def test_sentence_longer_than_the_recursion_limit():
    text = " ".join(f"word{i}" for i in range(1500))
    limit = sys.getrecursionlimit()
    assert rouge(text, text)["rougeL"] == pytest.approx(1, abs=1e-6)
    assert sys.getrecursionlimit() == limit
