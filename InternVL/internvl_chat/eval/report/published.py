"""Published results on PMC-MI-Bench (Chen et al., 2025, arXiv 2511.22232), in percent.

The paper does not report results for the compound-figure and bounding-box tasks.
"""

OPEN = ("bleu4", "rougeL", "bertscore", "sts")
CHOICE = ("accuracy", "f1", "recall", "precision")
TITLES = {
    "multisubimageVQA": "multi-image VQA",
    "single-subimageVQA": "single-image VQA",
    "puretext": "text-only QA",
    "multi-choice": "multi-choice VQA",
    "compoundVQA": "compound-figure VQA",
    "bboxVQA": "bounding-box VQA",
}
# Model -> task -> the metrics in `OPEN`, or in `CHOICE` for multi-choice.
PUBLISHED = {
    "InternVL3-8B": {
        "multisubimageVQA": (3.8, 22.5, 55.7, 71.4),
        "single-subimageVQA": (6.8, 29.5, 58.7, 78.6),
        "puretext": (9.1, 35.4, 68.3, 83.3),
        "multi-choice": (78.0, 78.0, 80.9, 79.2),
    },
    "M3LLM-8B": {
        "multisubimageVQA": (15.0, 37.8, 70.1, 78.2),
        "single-subimageVQA": (15.4, 38.4, 65.8, 82.5),
        "puretext": (13.0, 38.5, 73.4, 86.4),
        "multi-choice": (90.0, 89.9, 91.2, 89.8),
    },
}


def published(model: str, task: str, metric: str) -> float | None:
    """Return the published value of a metric in percent, or None if the paper does not report it."""
    row = PUBLISHED[model].get(task)
    names = CHOICE if task == "multi-choice" else OPEN
    return row[names.index(metric)] if row and metric in names else None
