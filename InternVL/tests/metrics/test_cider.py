"""CIDEr-D compared with the published definition and the COCO caption evaluation."""

import math
from collections import Counter

import pytest
from answer_pairs import PAIRS

from internvl_chat.metrics.bleu import tokenize
from internvl_chat.metrics.cider import cider


def expected_cider(predictions: list[str], references: list[str]) -> list[float]:
    """Equations 1 to 3 and 6 of Vedantam et al. (2015), for one reference per item."""
    total = len(references)

    def grams(text, n):
        tokens = tokenize(text)
        return [" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]

    scores = []
    for prediction, reference in zip(predictions, references, strict=True):
        cosines = []
        for n in range(1, 5):
            predicted, expected = Counter(grams(prediction, n)), Counter(grams(reference, n))
            idf = {
                g: math.log(total / max(1, sum(g in grams(other, n) for other in references)))
                for g in {*predicted, *expected}
            }
            norm = math.sqrt(sum((c * idf[g]) ** 2 for g, c in predicted.items()))
            norm *= math.sqrt(sum((c * idf[g]) ** 2 for g, c in expected.items()))
            dot = sum(min(predicted[g], expected[g]) * expected[g] * idf[g] ** 2 for g in predicted)
            cosines.append(dot / norm if norm else 0)
        length = len(grams(prediction, 2)) - len(grams(reference, 2))
        scores.append(10 * sum(cosines) / 4 * math.exp(-(length**2) / 72))
    return scores


def test_cider():
    predictions, references = zip(*PAIRS, strict=True)
    expected = expected_cider(list(predictions), list(references))
    assert cider(predictions, references) == pytest.approx(expected, abs=1e-9)
    assert max(expected) > 5 and min(expected) == 0


def test_cider_matches_the_coco_caption_evaluation():
    scorer = pytest.importorskip("pycocoevalcap.cider.cider", reason="pycocoevalcap is not installed")
    predictions, references = zip(*PAIRS, strict=True)
    named = [{i: [" ".join(tokenize(t))] for i, t in enumerate(side)} for side in (references, predictions)]
    _, expected = scorer.Cider(n=4, sigma=6.0).compute_score(*named)
    assert cider(predictions, references) == pytest.approx(list(expected), abs=1e-6)


def test_fewer_than_two_answers():
    assert cider([], []) == []
    assert cider(["same"], ["same"]) == [0.0]  # with one reference all weights are 0
