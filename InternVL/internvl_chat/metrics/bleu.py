"""BLEU-1 to BLEU-4 of single answers, computed with nltk."""

import warnings

_WEIGHTS = [(1 / n,) * n for n in range(1, 5)]


def bleu(prediction: str, reference: str) -> dict[str, float]:
    """Return `bleu1` to `bleu4`, with equal weights, brevity penalty and no smoothing.

    As in the published results, nltk returns 0 without a common word, and a value below 1e-70 without a
    common n-gram of a higher order.
    """
    from nltk.translate.bleu_score import sentence_bleu

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nltk warns about each order without a match
        scores = sentence_bleu([tokenize(reference)], tokenize(prediction), weights=_WEIGHTS)
    return {f"bleu{n}": float(score) for n, score in enumerate(scores, 1)}


def tokenize(text: str) -> list[str]:
    """Return the lower-cased words of a text, split at white space and before full stops.

    >>> tokenize("The MRI shows 3.5 mm.")
    ['the', 'mri', 'shows', '3', '.5', 'mm', '.']
    """
    return text.lower().replace(".", " .").split()
