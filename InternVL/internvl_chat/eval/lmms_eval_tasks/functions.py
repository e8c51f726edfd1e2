"""Functions that the YAML task files of lmms-eval call; they use the readers and metrics of `m3llm eval`.

lmms-eval passes only the loaded dataset to `process_docs`. Therefore, the folder of the questions comes from
an environment variable, and the task name from the dataset configuration (`dataset_name` in the YAML file).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from PIL import Image

from internvl_chat.constants import IMAGE_PLACEHOLDER
from internvl_chat.eval.benchmarks.catalog import open_benchmark, system_prompts
from internvl_chat.eval.benchmarks.item import Benchmark, Figure, Item
from internvl_chat.eval.benchmarks.pmc_mi import FILES
from internvl_chat.eval.scoring import score
from internvl_chat.metrics.suite import FAMILIES, Suite, build_suite
from internvl_chat.utils.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

DATA = "M3LLM_BENCH_DATA"
BERTSCORE_MODEL = "M3LLM_BERTSCORE_MODEL"
STS_MODEL = "M3LLM_STS_MODEL"

# Computed per item, so that lmms-eval can report the standard error of the mean.
_PER_ITEM = ("bleu", "rouge", "overlap")
# Computed over all answers of a task.
_PER_TASK = ("cider", "bertscore", "sts")
_CHOICE_AVERAGES = ("f1", "recall", "precision")
# lmms-eval scores in multiple threads, but `rouge` changes the global recursion limit.
_LOCK = Lock()


def process_docs(dataset: "Dataset") -> "Dataset":
    """Return a dataset with the questions of a task, which replaces the dataset loaded by lmms-eval.

    Args:
        dataset: placeholder, whose configuration name is the task name.

    Raises:
        UsageError: `M3LLM_BENCH_DATA` is not set, or the task is not in its folder.
        DataError: an item is invalid.
    """
    folder = os.environ.get(DATA)
    if not folder:
        raise UsageError(f"{DATA} is not set; set it to the folder of the questions")
    return type(dataset).from_list(read_documents(dataset.config_name, Path(folder)))


def read_documents(task: str, folder: Path) -> list[dict[str, Any]]:
    """Return the items of a task as JSON-serializable documents.

    Args:
        task: task of PMC-MI-Bench, or of a custom folder.
        folder: folder of PMC-MI-Bench, or the custom folder.

    Raises:
        UsageError: the folder or the task does not exist.
        DataError: an item is invalid.
    """
    name, data = ("pmc-mi", folder) if task in FILES else (str(folder), None)
    try:
        benchmark = open_benchmark(name, data, tasks=[task])
    except UsageError as error:
        raise UsageError(f"{DATA}={folder}: {error}") from None
    items = benchmark.items
    shared = {
        "task": task,
        "system": system_prompts(benchmark)[task],
        "multiple_choice": any(item.choices for item in items),
    }
    return [
        {
            **shared,
            "index": item.index,
            "question": item.question,
            "reference": item.reference,
            "choices": list(item.choices),
            "images": [str(figure.path) for figure in item.figures],
            "labels": [figure.label for figure in item.figures],
        }
        for item in items
    ]


def _item(doc: Mapping[str, Any]) -> Item:
    labeled = zip(doc["images"], doc["labels"], strict=True)
    figures = tuple(Figure(Path(path).name, label, Path(path)) for path, label in labeled)
    return Item(doc["task"], doc["index"], doc["question"], doc["reference"], figures, tuple(doc["choices"]))


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image.Image]:
    """Return the images of a document in RGB.

    Raises:
        DataError: an image cannot be decoded.
    """
    return [figure.decode() for figure in _item(doc).figures]


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> str:
    """Return the prompt for models without chat roles: system prompt, empty line, user message."""
    return "\n\n".join(message.content for message in _item(doc).messages(doc["system"]))


def doc_to_messages(
    doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Return the chat messages, with images in place of their placeholders.

    Args:
        lmms_eval_specific_kwargs: model options from the YAML file. Set `newline_after_image` if the chat
            template of the model adds a newline after each image.

    Raises:
        DataError: an image cannot be decoded.
    """
    newline = "\n" if (lmms_eval_specific_kwargs or {}).get("newline_after_image") else ""
    item = _item(doc)
    first, *others = item.text.split(IMAGE_PLACEHOLDER)
    content: list[dict[str, Any]] = [{"type": "text", "text": first}]
    for figure, text in zip(item.figures, others, strict=True):
        content.append({"type": "image", "url": figure.decode()})
        content.append({"type": "text", "text": text.removeprefix(newline)})
    user = {"role": "user", "content": [part for part in content if part.get("text") != ""]}
    if doc["system"] is None:
        return [user]
    return [{"role": "system", "content": [{"type": "text", "text": doc["system"]}]}, user]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Return the metrics of an answer in percent, and the inputs for metrics that are computed per task."""
    item, answer = _item(doc), results[0]
    pair = {"reference": item.reference, "choices": list(item.choices), "prediction": answer}
    with _LOCK:
        suite = _suite()
        if doc["multiple_choice"]:
            averages = _CHOICE_AVERAGES if "macro" in suite.families else ()
            accuracy = 100.0 * item.is_correct(answer)
            return {"accuracy": accuracy, **dict.fromkeys((*averages, "unreadable"), pair)}
        per_item = replace(suite, families=suite.families & set(_PER_ITEM))
        metrics = score(Benchmark("", (item,)), {item.key: answer}, per_item).tasks[item.task]
    computed = {name: metrics[name] for family in per_item.families for name in FAMILIES[family]}
    return computed | {family: pair for family in _PER_TASK if family in suite.families}


@cache
def _suite() -> Suite:
    return build_suite(
        None, bertscore_model=os.environ.get(BERTSCORE_MODEL), sts_model=os.environ.get(STS_MODEL)
    )


def _task_metric(pairs: Sequence[Mapping[str, Any]], *, name: str) -> float:
    """Return a metric over all answers of a task, computed as in `m3llm eval`."""
    items = [
        Item("task", n, "", pair["reference"], choices=tuple(pair["choices"])) for n, pair in enumerate(pairs)
    ]
    answers = {item.key: pair["prediction"] for item, pair in zip(items, pairs, strict=True)}
    suite = replace(_suite(), families=_suite().families & {name if name in _PER_TASK else "macro"})
    value = score(Benchmark("", tuple(items)), answers, suite).tasks["task"][name]
    if value is None:
        raise UsageError(f"the metric {name} was not computed")
    return value


cider = partial(_task_metric, name="cider")
bertscore = partial(_task_metric, name="bertscore")
sts = partial(_task_metric, name="sts")
macro_f1 = partial(_task_metric, name="f1")
macro_recall = partial(_task_metric, name="recall")
macro_precision = partial(_task_metric, name="precision")
unreadable = partial(_task_metric, name="unreadable")
