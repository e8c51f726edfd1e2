"""Answers and right answers become figures: of each item, and of each task in percent."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from internvl_chat.eval.benchmarks.item import Benchmark, Item, Key
from internvl_chat.metrics.bertscore import bert_score
from internvl_chat.metrics.bleu import bleu
from internvl_chat.metrics.choice import macro_averages
from internvl_chat.metrics.cider import cider
from internvl_chat.metrics.overlap import exact_match, word_overlap
from internvl_chat.metrics.rouge import rouge
from internvl_chat.metrics.sts import sentence_similarity
from internvl_chat.metrics.suite import CHOICE_METRICS, OPEN_METRICS, Suite

ALL = "all"


@dataclass(frozen=True)
class Scores:
    """The outcome of an evaluation.

    Attributes:
        tasks: task -> `items` (how many) and the metrics in percent, None for what was not computed; of
            multiple choice also `unreadable`, the answers that name no option.
        items: item -> metric -> score as the metric gives it, from 0 to 1 (`cider` from 0 to 10).
    """

    tasks: dict[str, dict[str, float | int | None]]
    items: dict[Key, dict[str, float]]


def score(benchmark: Benchmark, answers: Mapping[Key, str], suite: Suite) -> Scores:
    """Score the answers to all items of a benchmark.

    A task with multiple choice in it has accuracy (over all of its items, open ones by exact match) and the
    macro averages over the letters; any other has the metrics of open answers, each the mean over its items.

    Args:
        benchmark: the items that were answered.
        answers: of each item.
        suite: what to compute.
    """
    groups: dict[str, list[Item]] = {task: [] for task in benchmark.tasks}
    for item in benchmark.items:
        groups[item.task].append(item)
    open_items = [i for group in groups.values() if not _has_choices(group) for i in group]
    scores = _score_open(open_items, answers, suite)
    scores |= {i.key: {"accuracy": float(i.correct(answers[i.key]))}
               for group in groups.values() if _has_choices(group) for i in group}  # fmt: skip
    if benchmark.pooled and len(groups) > 1:
        groups[ALL] = list(benchmark.items)
    tasks = {}
    for task, group in groups.items():
        names = CHOICE_METRICS if _has_choices(group) else OPEN_METRICS
        means = {name: _mean_percent([scores[i.key].get(name) for i in group]) for name in names}
        tasks[task] = {"items": len(group), **means}
        if _has_choices(group):
            tasks[task] |= _choice_figures([i for i in group if i.choices], answers, suite)
    return Scores(tasks, scores)


def _has_choices(items: Sequence[Item]) -> bool:
    return any(item.choices for item in items)


def _mean_percent(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return 100 * sum(known) / len(known) if known and len(known) == len(values) else None


def _score_open(
    items: Sequence[Item], answers: Mapping[Key, str], suite: Suite
) -> dict[Key, dict[str, float]]:
    """Return the scores of open answers, CIDEr with the frequencies of each task's references."""
    said, expected = [answers[i.key] for i in items], [i.reference for i in items]
    singly: dict[str, Callable[[str, str], dict[str, float]]] = {
        "bleu": bleu,
        "rouge": rouge,
        "overlap": lambda answer, reference: {
            "em": exact_match(answer, reference),
            **word_overlap(answer, reference),
        },
    }
    found: list[dict[str, float]] = [{} for _ in items]
    for family in [name for name in singly if name in suite.families]:
        for row, answer, reference in zip(found, said, expected, strict=True):
            row |= singly[family](answer, reference)
    columns: dict[str, Sequence[float]] = {}
    if "cider" in suite.families:
        columns["cider"] = _cider_by_task(items, said, expected)
    if "bertscore" in suite.families and items:
        columns["bertscore"] = bert_score(
            said, expected, model=suite.bertscore_model, layer=suite.bertscore_layer, device=suite.device
        )
    if "sts" in suite.families and items:
        columns["sts"] = sentence_similarity(said, expected, model=suite.sts_model, device=suite.device)
    for name, column in columns.items():
        for row, value in zip(found, column, strict=True):
            row[name] = value
    return {item.key: row for item, row in zip(items, found, strict=True)}


def _cider_by_task(items: Sequence[Item], said: Sequence[str], expected: Sequence[str]) -> list[float]:
    places: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        places.setdefault(item.task, []).append(place)
    column = [0.0] * len(items)
    for group in places.values():
        values = cider([said[i] for i in group], [expected[i] for i in group])
        for place, value in zip(group, values, strict=True):
            column[place] = value
    return column


def _choice_figures(
    items: Sequence[Item], answers: Mapping[Key, str], suite: Suite
) -> dict[str, float | int | None]:
    """Return the macro averages over the letters in percent, and how many answers name no option."""
    letters = [item.answered(answers[item.key]) for item in items]
    figures: dict[str, float | int | None] = {"unreadable": letters.count(None)}
    if "macro" in suite.families:
        averages = macro_averages([item.reference for item in items], letters)
        figures |= {name: 100 * value for name, value in averages.items()}
    return figures
