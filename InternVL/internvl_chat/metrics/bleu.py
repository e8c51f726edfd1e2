"""Sentence-level BLEU-1 to BLEU-4, computed by nltk."""

import warnings

_WEIGHTS = [(1 / n,) * n for n in range(1, 5)]


def bleu(prediction: str, reference: str) -> dict[str, float]:
    """Return `bleu1` to `bleu4` with uniform weights, brevity penalty and no smoothing.

    As in the published results, all scores are 0 if no word matches. If only shorter n-grams match, the
    scores of the higher orders are practically 0 (below 1e-70).
    """
    from nltk.translate.bleu_score import sentence_bleu

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nltk warns about each order without matches
        scores = sentence_bleu([tokenize(reference)], tokenize(prediction), weights=_WEIGHTS)
    return {f"bleu{n}": float(score) for n, score in enumerate(scores, 1)}


def tokenize(text: str) -> list[str]:
    """Lowercase a text and split it at whitespace and before periods.

    >>> tokenize("The MRI shows 3.5 mm.")
    ['the', 'mri', 'shows', '3', '.5', 'mm', '.']
    """
    return text.lower().replace(".", " .").split()
