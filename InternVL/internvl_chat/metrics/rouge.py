"""Sentence-level ROUGE-1, ROUGE-2 and ROUGE-L, computed by the `rouge` package."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_NAMES = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeL"}


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """Return the case-insensitive F1 scores `rouge1`, `rouge2` and `rougeL`.

    If a string contains only whitespace and periods, which the package rejects, all scores are 0.
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
    """Raise the recursion limit, because the package recurses once per word."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + words)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
