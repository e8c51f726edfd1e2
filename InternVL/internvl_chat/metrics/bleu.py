"""BLEU-1 to BLEU-4 of single answers, by nltk."""

import warnings

from internvl_chat.metrics.text import words

_WEIGHTS = [(1 / n,) * n for n in range(1, 5)]


def bleu(prediction: str, reference: str) -> dict[str, float]:
    """Return `bleu1` to `bleu4` of an answer: equal weights up to n, no smoothing, with brevity penalty.

    What nltk makes of missing matches is kept, because the published figures have it: 0 without a common
    word, and without a common n-gram of a higher order a number so small (below 1e-70) that it counts as 0.
    """
    from nltk.translate.bleu_score import sentence_bleu

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nltk warns of each order without a match
        scores = sentence_bleu([words(reference)], words(prediction), weights=_WEIGHTS)
    return {f"bleu{n}": float(score) for n, score in enumerate(scores, 1)}
