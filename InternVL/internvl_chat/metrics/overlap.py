"""Exact match, and the overlap of the sets of words."""


def exact_match(prediction: str, reference: str) -> float:
    """Return 1 if the texts are the same but for case and white space at the ends, else 0."""
    return float(prediction.strip().lower() == reference.strip().lower())


def word_overlap(prediction: str, reference: str) -> dict[str, float]:
    """Return `f1`, `precision` and `recall` of the sets of lower-cased words, split at white space.

    Without a word on either side all three are 0.
    """
    found, expected = set(prediction.lower().split()), set(reference.lower().split())
    common = len(found & expected)
    if not common:
        return {"f1": 0.0, "precision": 0.0, "recall": 0.0}
    precision, recall = common / len(found), common / len(expected)
    return {"f1": 2 * precision * recall / (precision + recall), "precision": precision, "recall": recall}
