"""Score predictions against references: metrics of each item, and averages for each task in percent."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from internvl_chat.eval.benchmarks.item import Benchmark, Item, Key, plain_text
from internvl_chat.inference.engine import is_truncated
from internvl_chat.metrics.bertscore import bert_score
from internvl_chat.metrics.bleu import bleu
from internvl_chat.metrics.cider import cider
from internvl_chat.metrics.multiple_choice import macro_averages
from internvl_chat.metrics.overlap import exact_match, normalize_words, word_overlap
from internvl_chat.metrics.rouge import rouge
from internvl_chat.metrics.sts import sentence_similarity
from internvl_chat.metrics.suite import CHOICE_METRICS, JUDGE, OPEN_METRICS, Suite

ALL = "all"
Metrics = dict[str, float | int | None]


@dataclass(frozen=True)
class Scores:
    """Metrics of an evaluation.

    Attributes:
        tasks: task -> metrics in percent (None if not computed), and these counts:
            - `items`: scored items.
            - `total`: items of the full task (only if the task is scored partially).
            - `truncated`: answers cut off at the maximum number of tokens (only if there are any).
            - `unreadable`: answers from which no option could be parsed (only for multiple choice).
            - `judge_unreadable`: verdicts that could not be parsed (only with a judge).
        items: item -> metric -> score from 0 to 1 (`cider` from 0 to 10).
    """

    tasks: dict[str, Metrics]
    items: dict[Key, dict[str, float]]


def score(
    benchmark: Benchmark,
    answers: Mapping[Key, str],
    suite: Suite,
    verdicts: Mapping[Key, bool | None] | None = None,
) -> Scores:
    """Score the answers to all items of a benchmark.

    A task with multiple-choice items gets the accuracy over all items (with exact match for open items) and
    macro averages over the option letters. Any other task gets the open-answer metrics, averaged over items.

    Args:
        benchmark: benchmark restricted to the answered items.
        answers: item -> answer.
        suite: the metrics.
        verdicts: item -> verdict of a judge on an open answer; unreadable ones (None) are not averaged.
    """
    groups = _by_task(benchmark)
    normalize = normalize_words if benchmark.short_answers else None
    scores = _score_open(open_items(benchmark), answers, suite, normalize)
    for key, verdict in (verdicts or {}).items():
        scores[key] |= {} if verdict is None else {JUDGE: float(verdict)}
    scores |= {i.key: {"accuracy": float(_is_correct(i, answers[i.key], normalize))}
               for group in groups.values() if _has_choices(group) for i in group}  # fmt: skip
    if benchmark.pooled and len(groups) > 1:
        groups[ALL] = list(benchmark.items)
    tasks = {}
    for task, group in groups.items():
        names = CHOICE_METRICS if _has_choices(group) else OPEN_METRICS
        means = {name: _mean_percent([scores[i.key].get(name) for i in group]) for name in names}
        total = benchmark.totals.get(task, 0) if task != ALL else sum(benchmark.totals.values())
        tasks[task] = {"items": len(group), **({"total": total} if len(group) < total else {}), **means}
        if truncated := sum(is_truncated(answers[i.key]) for i in group):
            tasks[task]["truncated"] = truncated
        if verdicts is not None and not _has_choices(group):
            tasks[task] |= _judge_metrics([verdicts[i.key] for i in group])
        if _has_choices(group):
            tasks[task] |= _choice_metrics([i for i in group if i.choices], answers, suite)
    return Scores(tasks, scores)


def _is_correct(item: Item, answer: str, normalize: Callable[[str], str] | None) -> bool:
    if normalize and not item.choices:
        return normalize(plain_text(answer)) == normalize(item.reference)
    return item.is_correct(answer)


def _by_task(benchmark: Benchmark) -> dict[str, list[Item]]:
    groups: dict[str, list[Item]] = {task: [] for task in benchmark.tasks}
    for item in benchmark.items:
        groups[item.task].append(item)
    return groups


def open_items(benchmark: Benchmark) -> list[Item]:
    """Return the items of all tasks without multiple-choice items."""
    return [item for group in _by_task(benchmark).values() if not _has_choices(group) for item in group]


def _judge_metrics(verdicts: Sequence[bool | None]) -> Metrics:
    """Return the percentage of readable verdicts that are `correct`, and the number of unreadable ones."""
    known = [float(verdict) for verdict in verdicts if verdict is not None]
    return {JUDGE: _mean_percent(known), f"{JUDGE}_unreadable": len(verdicts) - len(known)}


def _has_choices(items: Sequence[Item]) -> bool:
    return any(item.choices for item in items)


def _mean_percent(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return 100 * sum(known) / len(known) if known and len(known) == len(values) else None


def _score_open(
    items: Sequence[Item],
    answers: Mapping[Key, str],
    suite: Suite,
    normalize: Callable[[str], str] | None = None,
) -> dict[Key, dict[str, float]]:
    """Return the scores of open answers, keyed by item. CIDEr uses the document frequencies of each task."""
    predictions = [plain_text(answers[i.key]) for i in items]
    references = [plain_text(i.reference) for i in items]
    if normalize:
        predictions, references = list(map(normalize, predictions)), list(map(normalize, references))
    item_metrics: dict[str, Callable[[str, str], dict[str, float]]] = {
        "bleu": bleu,
        "rouge": rouge,
        "overlap": lambda prediction, reference: {
            "em": exact_match(prediction, reference),
            **word_overlap(prediction, reference),
        },
    }
    rows: list[dict[str, float]] = [{} for _ in items]
    for family in [name for name in item_metrics if name in suite.families]:
        for row, prediction, reference in zip(rows, predictions, references, strict=True):
            row |= item_metrics[family](prediction, reference)
    columns: dict[str, Sequence[float]] = {}
    if "cider" in suite.families:
        columns["cider"] = _cider_by_task(items, predictions, references)
    if suite.bertscore_model is not None and "bertscore" in suite.families and items:
        columns["bertscore"] = bert_score(
            predictions,
            references,
            model=suite.bertscore_model,
            layer=suite.bertscore_layer,
            device=suite.device,
        )
    if suite.sts_model is not None and "sts" in suite.families and items:
        columns["sts"] = sentence_similarity(
            predictions, references, model=suite.sts_model, device=suite.device
        )
    for name, column in columns.items():
        for row, value in zip(rows, column, strict=True):
            row[name] = value
    return {item.key: row for item, row in zip(items, rows, strict=True)}


def _cider_by_task(
    items: Sequence[Item], predictions: Sequence[str], references: Sequence[str]
) -> list[float]:
    by_task: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        by_task[item.task].append(index)
    column = [0.0] * len(items)
    for indices in by_task.values():
        values = cider([predictions[i] for i in indices], [references[i] for i in indices])
        for index, value in zip(indices, values, strict=True):
            column[index] = value
    return column


def _choice_metrics(items: Sequence[Item], answers: Mapping[Key, str], suite: Suite) -> Metrics:
    """Return the macro averages over the option letters in percent, and the number of unparsable answers."""
    letters = [item.selected_letter(answers[item.key]) for item in items]
    metrics: Metrics = {"unreadable": letters.count(None)}
    if "macro" in suite.families:
        averages = macro_averages([item.reference for item in items], letters)
        metrics |= {name: 100 * value for name, value in averages.items()}
    return metrics
