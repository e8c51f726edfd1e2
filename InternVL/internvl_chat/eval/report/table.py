"""The figures of an evaluation as Markdown; those of PMC-MI-Bench in the paper's layout, beside its rows."""

from collections.abc import Iterable, Mapping, Sequence

from internvl_chat.eval.report.published import CHOICE, OPEN, PUBLISHED, TITLES, published
from internvl_chat.metrics.suite import CHOICE_METRICS, OPEN_METRICS

LABELS = {
    "bleu1": "BLEU@1", "bleu2": "BLEU@2", "bleu3": "BLEU@3", "bleu4": "BLEU@4", "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "em": "exact match", "f1": "F1", "precision": "precision",
    "recall": "recall", "cider": "CIDEr", "bertscore": "BERTScore", "sts": "STS", "accuracy": "accuracy",
}  # fmt: skip
Figures = Mapping[str, float | int | None]
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def is_choice(figures: Figures) -> bool:
    """Say whether a task's figures are those of multiple choice."""
    return "accuracy" in figures


def percent(value: float | None) -> str:
    """Return a figure with one digit, a dash for none."""
    return "-" if value is None else f"{value:.1f}"


def all_figures(tasks: Mapping[str, Figures]) -> list[Table]:
    """Return a table of every metric of the open tasks, and one of those of multiple choice."""
    tables: list[Table] = []
    for names, wanted in ((OPEN_METRICS, False), (CHOICE_METRICS, True)):
        chosen = {task: figures for task, figures in tasks.items() if is_choice(figures) == wanted}
        if chosen:
            counts = ("items", "unreadable") if wanted else ("items",)
            header = ("task", *counts, *(LABELS[name] for name in names))
            rows = [
                (
                    task,
                    *(f"{figures[name]:,}" for name in counts),
                    *(percent(figures.get(name)) for name in names),
                )
                for task, figures in chosen.items()
            ]
            tables.append((header, rows))
    return tables


def paper_layout(tasks: Mapping[str, Figures], model: str) -> list[Table]:
    """Return the tables of PMC-MI-Bench as the paper has them: a row for each task and model."""
    tables: list[Table] = []
    for names, wanted in ((OPEN, False), (CHOICE, True)):
        rows: list[tuple[str, ...]] = []
        for task in [name for name in TITLES if name in tasks and is_choice(tasks[name]) == wanted]:
            rows += [
                (TITLES[task], other, *(percent(published(other, task, name)) for name in names))
                for other in PUBLISHED
                if task in PUBLISHED[other]
            ]
            rows.append((TITLES[task], f"**{model}**", *(percent(tasks[task].get(name)) for name in names)))
        if rows:
            tables.append((("task", "model", *(LABELS[name] for name in names)), rows))
    return tables


def markdown(tasks: Mapping[str, Figures], *, benchmark: str, model: str) -> str:
    """Return the report in Markdown.

    Args:
        tasks: the figures of each task.
        benchmark: its name; PMC-MI-Bench also gets the paper's tables.
        model: what the answers are of.
    """
    parts = [f"# {benchmark}: {model}", "In percent; - was not computed."]
    if benchmark == "pmc-mi":
        parts += ["## Beside the published figures"]
        parts += [_render(*table) for table in paper_layout(tasks, model)]
        parts += ["## All figures"]
    parts += [_render(*table) for table in all_figures(tasks)]
    return "\n\n".join(parts) + "\n"


def _render(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = [":--" if name in ("task", "model") else "--:" for name in header]
    escaped = (tuple(map(_escape, row)) for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *escaped))


def _escape(text: str) -> str:
    """Return a text that does not end its cell."""
    return text.replace("|", r"\|")
