"""Exact match, and word-overlap F1, precision and recall."""


def exact_match(prediction: str, reference: str) -> float:
    """Return 1 if the strings match, ignoring case and surrounding whitespace, else 0."""
    return float(prediction.strip().lower() == reference.strip().lower())


def word_overlap(prediction: str, reference: str) -> dict[str, float]:
    """Return `f1`, `precision` and `recall` of the sets of lowercase words, split at whitespace.

    All three are 0 if the sets are disjoint.
    """
    predicted, expected = set(prediction.lower().split()), set(reference.lower().split())
    common = len(predicted & expected)
    if not common:
        return {"f1": 0.0, "precision": 0.0, "recall": 0.0}
    precision, recall = common / len(predicted), common / len(expected)
    return {"f1": 2 * precision * recall / (precision + recall), "precision": precision, "recall": recall}
