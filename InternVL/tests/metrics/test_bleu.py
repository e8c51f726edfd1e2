"""BLEU and its tokenization compared with the published definition."""

import math
import sys
from collections import Counter
from fractions import Fraction

import pytest
from answer_pairs import IDS, PAIRS

from internvl_chat.metrics.bleu import bleu, tokenize


def test_tokenize():
    assert tokenize("The MRI shows 3.5 mm...") == ["the", "mri", "shows", "3", ".5", "mm", ".", ".", "."]
    assert tokenize(" \n") == []


def expected_bleu(answer: str, reference: str, order: int) -> float:
    """Papineni et al. (2002), equations 1 to 3, if every order has a match; otherwise as nltk does."""
    predicted, expected = tokenize(answer), tokenize(reference)
    logs = []
    for n in range(1, order + 1):
        found = Counter(tuple(predicted[i : i + n]) for i in range(len(predicted) - n + 1))
        allowed = Counter(tuple(expected[i : i + n]) for i in range(len(expected) - n + 1))
        clipped = sum(min(count, allowed[ngram]) for ngram, count in found.items())
        if n == 1 and not clipped:
            return 0.0
        precision = Fraction(clipped, max(1, sum(found.values())))
        logs.append(math.log(precision) if precision else math.log(sys.float_info.min))
    penalty = 1 if len(predicted) > len(expected) else math.exp(1 - len(expected) / len(predicted))
    return penalty * math.exp(sum(logs) / order)


@pytest.mark.parametrize(("answer", "reference"), PAIRS, ids=IDS)
def test_bleu(answer, reference, recwarn):
    expected = {f"bleu{n}": expected_bleu(answer, reference, n) for n in range(1, 5)}
    assert bleu(answer, reference) == pytest.approx(expected, abs=1e-9)
    assert not recwarn.list


def test_bleu_of_known_sentences():
    # Unigrams 4 of 5, pairs 2 of 4, no brevity penalty.
    scores = bleu("the cat sat on mat", "The cat sat near mat")
    assert scores["bleu1"] == pytest.approx(4 / 5, abs=1e-9)
    assert scores["bleu2"] == pytest.approx(math.sqrt(4 / 5 * 2 / 4), abs=1e-9)
    assert bleu("a b c d", "a b c d e f")["bleu4"] == pytest.approx(math.exp(1 - 6 / 4), abs=1e-9)
    assert 0 < bleu("no match of four words", "words of four match no")["bleu4"] < 1e-70
