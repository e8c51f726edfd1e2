"""Exact match, and F1, precision and recall of word sets."""


def exact_match(prediction: str, reference: str) -> float:
    """Return 1 if the texts are equal up to case and surrounding white space, else 0."""
    return float(prediction.strip().lower() == reference.strip().lower())


def word_overlap(prediction: str, reference: str) -> dict[str, float]:
    """Return `f1`, `precision` and `recall` of the sets of lower-cased words, split at white space.

    All are 0 if a text has no words.
    """
    predicted, expected = set(prediction.lower().split()), set(reference.lower().split())
    common = len(predicted & expected)
    if not common:
        return {"f1": 0.0, "precision": 0.0, "recall": 0.0}
    precision, recall = common / len(predicted), common / len(expected)
    return {"f1": 2 * precision * recall / (precision + recall), "precision": precision, "recall": recall}
