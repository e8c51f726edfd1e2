"""Compare the evaluations of several models on the same items; the first one is the baseline."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from internvl_chat.eval.benchmarks.item import Key
from internvl_chat.eval.benchmarks.reading import raise_problems
from internvl_chat.eval.report.files import DATA, PAGE
from internvl_chat.eval.report.items import Evaluation, ReportItem
from internvl_chat.eval.scoring import ALL
from internvl_chat.eval.significance import Difference, compare_scores, holm
from internvl_chat.metrics.suite import JUDGE
from internvl_chat.utils.errors import DataError, UsageError
from internvl_chat.utils.html import read_json_script
from internvl_chat.utils.text import counted

# Metrics that are compared by default, if all evaluations have them.
MAIN_METRICS = ("accuracy", JUDGE, "em", "recall", "bleu4", "rougeL", "bertscore", "sts")
# Task, metric, model, and the scores of the baseline and of the model for each item.
_Job = tuple[str, str, str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Comparison:
    """Comparison of a model with the baseline in one metric of one task; scores are from 0 to 1.

    Attributes:
        items: number of items with this metric in both evaluations.
        p_holm: p-value of the difference, corrected for all comparisons that are made together.
    """

    task: str
    metric: str
    items: int
    baseline: str
    model: str
    baseline_score: float
    score: float
    difference: Difference
    p_holm: float


def read_evaluations(folders: Sequence[Path], *, common: bool) -> list[Evaluation]:
    """Read evaluations and return them with unique names and the same items in the same order.

    Args:
        folders: output folders of `m3llm eval --bench`.
        common: keep only the items that all evaluations have; also accept different protocols.

    Raises:
        DataError: a folder has no report.
        UsageError: the benchmarks differ, no item is in all evaluations, or items or protocols differ and
            `common` is False.
    """
    evaluations = _read_all(folders)
    problems = []
    if len(names := dict.fromkeys(e.benchmark for e in evaluations)) > 1:
        raise UsageError(f"different benchmarks cannot be compared: {', '.join(names)}")
    if not common and len(protocols := dict.fromkeys(e.protocol for e in evaluations)) > 1:
        problems.append(f"different protocols ({'; '.join(protocols)})")
    shared = _shared_items(evaluations)
    for folder, evaluation in zip(folders, evaluations, strict=True):
        if not common and (more := len(evaluation.items) - len(shared)):
            problems.append(
                f"{folder}: {counted(more, 'item')} that the others do not have or word differently"
            )
    if problems:
        problems[-1] += (
            f"; --common compares the {counted(len(shared), 'item')} that all have, across protocols"
        )
        raise UsageError(problems)
    if not shared:
        raise UsageError("the evaluations have no items in common")
    labels = _unique_names(evaluations, folders)
    return [
        replace(evaluation, model=label, items=_in_order(evaluation.items, shared))
        for evaluation, label in zip(evaluations, labels, strict=True)
    ]


def _read_all(folders: Sequence[Path]) -> list[Evaluation]:
    evaluations, problems = [], []
    for folder in folders:
        try:
            evaluations.append(Evaluation.read(folder / DATA))
        except DataError as error:
            problems.append(str(error))
    raise_problems(problems)
    return evaluations


def _identity(item: ReportItem) -> tuple[Key, str, str]:
    return item.key, item.question, item.reference


def _shared_items(evaluations: Sequence[Evaluation]) -> list[Key]:
    """Return the items with the same question and reference in all evaluations, in the order of the first."""
    counts = Counter(_identity(item) for evaluation in evaluations for item in evaluation.items)
    return [item.key for item in evaluations[0].items if counts[_identity(item)] == len(evaluations)]


def _in_order(items: Sequence[ReportItem], keys: Sequence[Key]) -> list[ReportItem]:
    by_key = {item.key: item for item in items}
    return [by_key[key] for key in keys]


def _unique_names(evaluations: Sequence[Evaluation], folders: Sequence[Path]) -> list[str]:
    """Return the model names, with the protocol or the folder if they would be equal."""
    names = [evaluation.model for evaluation in evaluations]
    if len({evaluation.protocol for evaluation in evaluations}) > 1:
        names = [f"{e.model} ({e.protocol})" for e in evaluations]
    if len({*names}) < len(names):
        names = [f"{name} ({folder})" for name, folder in zip(names, folders, strict=True)]
    return names


def read_images(
    folders: Sequence[Path], evaluations: Sequence[Evaluation]
) -> tuple[Evaluation, Mapping[str, str]]:
    """Return the images of the first page that has images, and the first evaluation with their ids."""
    for folder, evaluation in zip(folders, evaluations, strict=True):
        if any(image["id"] for item in evaluation.items for image in item.images):
            try:
                images = read_json_script((folder / PAGE).read_text(encoding="utf-8"), "images")
            except (OSError, ValueError):
                continue
            items = [
                replace(item, images=shown.images)
                for item, shown in zip(evaluations[0].items, evaluation.items, strict=True)
            ]
            used = {image["id"] for item in items for image in item.images}
            return replace(evaluations[0], items=items), {k: v for k, v in images.items() if k in used}
    return evaluations[0], {}


def compare(
    evaluations: Sequence[Evaluation],
    metrics: Sequence[str] = MAIN_METRICS,
    progress: Callable[[list[_Job]], Iterable[_Job]] = iter,
) -> list[Comparison]:
    """Compare each model with the first one, in each task and metric that both have.

    Args:
        evaluations: evaluations with the same items in the same order.
        metrics: the metrics to compare.
        progress: wraps the comparisons in a progress bar.

    Raises:
        UsageError: the evaluations have none of the metrics in common.
    """
    baseline, *others = evaluations
    jobs = [
        (task, metric, other.model, pairs)
        for task, numbers in _groups(baseline.items).items()
        for metric in metrics
        for other in others
        if (pairs := list(_pairs(baseline, other, numbers, metric)))
    ]
    if not jobs:
        raise UsageError(f"the evaluations have no scores in common for {', '.join(metrics)}")
    rows = [_comparison(baseline.model, *job) for job in progress(jobs)]
    corrected = holm([row.difference.p_value for row in rows])
    return [replace(row, p_holm=p_value) for row, p_value in zip(rows, corrected, strict=True)]


def _groups(items: Sequence[ReportItem]) -> dict[str, list[int]]:
    """Return the positions of the items of each task, and of all items if all have accuracy."""
    groups: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        groups.setdefault(item.task, []).append(number)
    if len(groups) > 1 and all("accuracy" in item.answer["scores"] for item in items):
        groups[ALL] = list(range(len(items)))
    return groups


def _pairs(
    baseline: Evaluation, other: Evaluation, numbers: Sequence[int], metric: str
) -> Iterator[tuple[float, float]]:
    """Yield the scores of both models for the items that have them; a judge may have given no verdict."""
    for number in numbers:
        scores = [e.items[number].answer["scores"].get(metric) for e in (baseline, other)]
        if None not in scores:
            yield scores[0], scores[1]


def _comparison(
    baseline: str, task: str, metric: str, model: str, pairs: Sequence[tuple[float, float]]
) -> Comparison:
    first, second = ([pair[n] for pair in pairs] for n in (0, 1))
    means = (sum(first) / len(pairs), sum(second) / len(pairs))
    return Comparison(task, metric, len(pairs), baseline, model, *means, compare_scores(first, second), 1.0)
