"""CIDEr-D (Vedantam et al., CVPR 2015): cosines of tf-idf vectors of n-grams, with a penalty on length.

The same numbers as the scorer of the COCO captions evaluation, with one reference an answer.
"""

import math
from collections import Counter
from collections.abc import Sequence

from internvl_chat.metrics.text import words

_ORDERS = 4
_SIGMA = 6.0
_SCALE = 10.0


def cider(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return the score of each answer, from 0 to 10.

    How much an n-gram weighs depends on how many of the references have it, so that a score is one of the
    whole set: with a single reference every weight, and the score, is 0.

    Args:
        predictions: the answers.
        references: one for each.
    """
    expected = [_ngrams(words(text)) for text in references]
    frequency = Counter(ngram for counts in expected for ngram in counts)
    total = math.log(len(references)) if references else 0.0

    def vectors(counts: Counter) -> list[dict]:
        """Return the tf-idf vector of each order of n-grams."""
        found: list[dict] = [{} for _ in range(_ORDERS)]
        for ngram, count in counts.items():
            found[len(ngram) - 1][ngram] = count * (total - math.log(max(1, frequency[ngram])))
        return found

    scores = []
    for text, reference in zip(predictions, expected, strict=True):
        answer = _ngrams(words(text))
        pairs = zip(vectors(answer), vectors(reference), strict=True)
        similarity = sum(_clipped_cosine(*pair) for pair in pairs) / _ORDERS
        # The original counts length in pairs of words.
        difference = _pairs(answer) - _pairs(reference)
        scores.append(_SCALE * similarity * math.exp(-(difference**2) / (2 * _SIGMA**2)))
    return scores


def _ngrams(tokens: Sequence[str]) -> Counter:
    orders = range(1, _ORDERS + 1)
    return Counter(tuple(tokens[i : i + n]) for n in orders for i in range(len(tokens) - n + 1))


def _pairs(counts: Counter) -> int:
    return sum(count for ngram, count in counts.items() if len(ngram) == 2)


def _clipped_cosine(answer: dict, reference: dict) -> float:
    """Return the cosine, no n-gram of the answer counting more than in the reference."""
    norms = math.sqrt(sum(v * v for v in answer.values()) * sum(v * v for v in reference.values()))
    if not norms:
        return 0.0
    return sum(min(value, reference.get(ngram, 0.0)) * reference.get(ngram, 0.0)
               for ngram, value in answer.items()) / norms  # fmt: skip
