"""CIDEr-D (Vedantam et al., CVPR 2015): cosine similarity of tf-idf n-gram vectors, with a length penalty.

The scores match the COCO caption evaluation with one reference per answer.
"""

import math
from collections import Counter
from collections.abc import Sequence

from internvl_chat.metrics.bleu import tokenize

_ORDERS = 4
_SIGMA = 6.0
_SCALE = 10.0


def cider(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return the score of each answer, from 0 to 10.

    Document frequencies are computed over `references`, so a score depends on the entire set. With a single
    reference, all weights and the score are 0.

    Args:
        predictions: the answers.
        references: one reference per answer.
    """
    expected = [_ngrams(tokenize(text)) for text in references]
    frequency = Counter(ngram for counts in expected for ngram in counts)
    log_total = math.log(len(references)) if references else 0.0

    def vectors(counts: Counter) -> list[dict]:
        """Return one tf-idf vector per n-gram order."""
        orders: list[dict] = [{} for _ in range(_ORDERS)]
        for ngram, count in counts.items():
            orders[len(ngram) - 1][ngram] = count * (log_total - math.log(max(1, frequency[ngram])))
        return orders

    scores = []
    for text, reference in zip(predictions, expected, strict=True):
        answer = _ngrams(tokenize(text))
        pairs = zip(vectors(answer), vectors(reference), strict=True)
        similarity = sum(_clipped_cosine(*pair) for pair in pairs) / _ORDERS
        # As in the original implementation, the length is the number of bigrams.
        difference = _num_bigrams(answer) - _num_bigrams(reference)
        scores.append(_SCALE * similarity * math.exp(-(difference**2) / (2 * _SIGMA**2)))
    return scores


def _ngrams(tokens: Sequence[str]) -> Counter:
    orders = range(1, _ORDERS + 1)
    return Counter(tuple(tokens[i : i + n]) for n in orders for i in range(len(tokens) - n + 1))


def _num_bigrams(counts: Counter) -> int:
    return sum(count for ngram, count in counts.items() if len(ngram) == 2)


def _clipped_cosine(answer: dict, reference: dict) -> float:
    """Return the cosine similarity, with the weights of the answer clipped to those of the reference."""
    norms = math.sqrt(sum(v * v for v in answer.values()) * sum(v * v for v in reference.values()))
    if not norms:
        return 0.0
    return sum(min(value, reference.get(ngram, 0.0)) * reference.get(ngram, 0.0)
               for ngram, value in answer.items()) / norms  # fmt: skip
