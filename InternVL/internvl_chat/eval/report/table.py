"""Tables of the metrics, also in Markdown; for PMC-MI-Bench, they include the published results."""

from collections.abc import Mapping

from internvl_chat.constants import PUBLISHED_PROTOCOL, STANDARD_PROTOCOL
from internvl_chat.eval.report.published import CHOICE, OPEN, PUBLISHED, TITLES, published
from internvl_chat.metrics.suite import CHOICE_METRICS, JUDGE, OPEN_METRICS
from internvl_chat.utils.markdown import markdown_table

LABELS = {
    "bleu1": "BLEU@1", "bleu2": "BLEU@2", "bleu3": "BLEU@3", "bleu4": "BLEU@4", "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "em": "exact match", "f1": "F1", "precision": "precision",
    "recall": "recall", "cider": "CIDEr", "bertscore": "BERTScore", "sts": "STS", "accuracy": "accuracy",
    "judge": "judge",
}  # fmt: skip
NOTE = "All values in percent; - means not computed."
PAPER_NOTE = (
    "The paper's rows were measured with the published protocol; compare only rows of the same protocol."
)
Metrics = Mapping[str, float | int | None]
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def is_choice(metrics: Metrics) -> bool:
    """Return whether the metrics belong to a multiple-choice task."""
    return "accuracy" in metrics


def percent(value: float | None) -> str:
    """Format a percentage with one decimal place; None becomes a dash."""
    return "-" if value is None else f"{value:.1f}"


def is_partial(metrics: Metrics) -> bool:
    """Return whether only a part of the task's items is scored."""
    return "total" in metrics


def _label(model: str, metrics: Metrics) -> str:
    """Return the row label; it marks partial scores, which are not comparable with published results."""
    if not is_partial(metrics):
        return f"**{model}**"
    return f"**{model}** (partial: {metrics['items']:,} of {metrics['total']:,} items)"


def _count(metrics: Metrics, name: str) -> str:
    """Format a count; for a partially scored task, the number of items is formatted as "N of TOTAL"."""
    if name == "items" and is_partial(metrics):
        return f"{metrics['items']:,} of {metrics['total']:,}"
    return f"{metrics[name]:,}"


def _value(metrics: Metrics, name: str) -> str:
    """Format a metric, with the number of unreadable verdicts, which a judge's average excludes."""
    unreadable = metrics.get(f"{name}_unreadable")
    return percent(metrics.get(name)) + (f" ({unreadable:,} unreadable)" if unreadable else "")


def metric_tables(tasks: Mapping[str, Metrics]) -> list[Table]:
    """Return one table for the open tasks and one for the multiple-choice tasks; omit an empty table."""
    tables: list[Table] = []
    judged = (JUDGE,) if any(JUDGE in metrics for metrics in tasks.values()) else ()
    for names, choice in (((*judged, *OPEN_METRICS), False), (CHOICE_METRICS, True)):
        counts = ("items", "unreadable") if choice else ("items",)
        rows = [
            (
                task,
                *(_count(metrics, name) for name in counts),
                *(_value(metrics, name) for name in names),
            )
            for task, metrics in tasks.items()
            if is_choice(metrics) == choice
        ]
        if rows:
            tables.append((("task", *counts, *(LABELS[name] for name in names)), rows))
    return tables


def paper_tables(tasks: Mapping[str, Metrics], model: str, protocol: str = STANDARD_PROTOCOL) -> list[Table]:
    """Return the tables of PMC-MI-Bench in the layout of the paper, with one row per task and model.

    Args:
        protocol: name of the protocol, with any deviation from it.
    """
    tables: list[Table] = []
    for names, choice in ((OPEN, False), (CHOICE, True)):
        rows: list[tuple[str, ...]] = []
        for task in [name for name in TITLES if name in tasks and is_choice(tasks[name]) == choice]:
            rows += [
                (
                    TITLES[task],
                    other,
                    PUBLISHED_PROTOCOL,
                    *(percent(published(other, task, n)) for n in names),
                )
                for other in PUBLISHED
                if task in PUBLISHED[other]
            ]
            values = (percent(tasks[task].get(name)) for name in names)
            rows.append((TITLES[task], _label(model, tasks[task]), protocol, *values))
        if rows:
            tables.append((("task", "model", "protocol", *(LABELS[name] for name in names)), rows))
    return tables


def markdown(
    tasks: Mapping[str, Metrics], *, benchmark: str, model: str, protocol: str = STANDARD_PROTOCOL
) -> str:
    """Return the report in Markdown.

    Args:
        benchmark: benchmark name; `pmc-mi` adds the comparison with the published results.
        protocol: name of the protocol, with any deviation from it.
    """
    parts = [f"# {benchmark}: {model}", NOTE]
    if benchmark == "pmc-mi":
        parts += ["## Comparison with the published results", PAPER_NOTE]
        parts += [markdown_table(*table, left=3) for table in paper_tables(tasks, model, protocol)]
        parts += ["## All metrics"]
    parts += [markdown_table(*table, left=1) for table in metric_tables(tasks)]
    return "\n\n".join(parts) + "\n"
