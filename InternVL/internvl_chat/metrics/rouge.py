"""ROUGE-1, ROUGE-2 and ROUGE-L of single answers, computed with the package `rouge`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_NAMES = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeL"}


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """Return the F scores `rouge1`, `rouge2` and `rougeL` of lower-cased texts.

    Texts of only white space and full stops, which the package rejects, score 0.
    """
    from rouge import Rouge

    texts = (prediction.lower(), reference.lower())
    if not all(text.replace(".", " ").split() for text in texts):
        return dict.fromkeys(_NAMES.values(), 0.0)
    with _extra_recursion(sum(len(text.split()) for text in texts)):
        [scores] = Rouge().get_scores(*texts)
    return {name: float(scores[key]["f"]) for key, name in _NAMES.items()}


@contextmanager
def _extra_recursion(words: int) -> Iterator[None]:
    """Raise the recursion limit: the package recurses once for each word of a sentence."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + words)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
