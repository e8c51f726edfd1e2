"""The functions that the YAML files name: lmms-eval's documents and results by our readers and metrics.

lmms-eval loads a data set and then hands it to `process_docs`, which knows neither the task nor its settings.
So the folder of the questions comes from the environment, and the task's name with the data set, as its
configuration (`dataset_name` in the YAML file).
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
from internvl_chat.eval.benchmarks.catalog import open_benchmark, system_texts
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

# Of each answer by itself, so that lmms-eval can tell the standard error of their mean.
_SINGLY = ("bleu", "rouge", "overlap")
# Of all answers of a task at once.
_TOGETHER = ("cider", "bertscore", "sts")
_OF_LETTERS = ("f1", "recall", "precision")
# lmms-eval scores in several threads, and `rouge` sets the interpreter's recursion limit.
_ONE_AT_A_TIME = Lock()


def process_docs(dataset: "Dataset") -> "Dataset":
    """Return a task's documents in place of what lmms-eval has loaded.

    Args:
        dataset: anything; its configuration's name is the task.

    Raises:
        UsageError: the environment does not say where the questions are, or they have no such task.
        DataError: items cannot be used.
    """
    folder = os.environ.get(DATA)
    if not folder:
        raise UsageError(f"{DATA} is not set; it must name the folder of the questions")
    return type(dataset).from_list(read_documents(dataset.config_name, Path(folder)))


def read_documents(task: str, folder: Path) -> list[dict[str, Any]]:
    """Return the items of a task as flat records.

    Args:
        task: of PMC-MI-Bench, or the name of a file in a folder in its format.
        folder: as `--data` of `m3llm eval`, or the user's own as its `--bench`.

    Raises:
        UsageError: there is no such folder or task.
        DataError: items cannot be used.
    """
    benchmark = open_benchmark("pmc-mi", folder) if task in FILES else open_benchmark(str(folder), None)
    items = benchmark.select([task], None).items
    if not items:
        raise UsageError(f"{DATA}={folder}: no task {task}, only {', '.join(benchmark.tasks)}")
    shared = {
        "task": task,
        "system": system_texts(benchmark)[task],
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
    shown = zip(doc["images"], doc["labels"], strict=True)
    figures = tuple(Figure(Path(path).name, label, Path(path)) for path, label in shown)
    return Item(doc["task"], doc["index"], doc["question"], doc["reference"], figures, tuple(doc["choices"]))


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image.Image]:
    """Return a document's images in RGB.

    Raises:
        DataError: one cannot be decoded.
    """
    return [figure.decode() for figure in _item(doc).figures]


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> str:
    """Return what a model without roles is asked: the system text, an empty line, and the user's message."""
    return "\n\n".join(message.content for message in _item(doc).messages(doc["system"]))


def doc_to_messages(
    doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Return the conversation to be continued, the images where their placeholders are.

    Args:
        doc: the question.
        lmms_eval_specific_kwargs: what the YAML file has for the model; `newline_after_image` says that its
            chat template puts a newline behind each image.

    Raises:
        DataError: an image cannot be decoded.
    """
    added = "\n" if (lmms_eval_specific_kwargs or {}).get("newline_after_image") else ""
    item = _item(doc)
    first, *others = item.text.split(IMAGE_PLACEHOLDER)
    content = [{"type": "text", "text": first}]
    for figure, text in zip(item.figures, others, strict=True):
        content.append({"type": "image", "url": figure.decode()})
        content.append({"type": "text", "text": text.removeprefix(added)})
    asked = {"role": "user", "content": [part for part in content if part.get("text") != ""]}
    if doc["system"] is None:
        return [asked]
    return [{"role": "system", "content": [{"type": "text", "text": doc["system"]}]}, asked]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Return an answer's metrics in percent, and what the metrics of a whole task are computed from.

    Args:
        doc: the question.
        results: the answer, alone in a list.
    """
    item, answer = _item(doc), results[0]
    pair = {"reference": item.reference, "choices": list(item.choices), "prediction": answer}
    with _ONE_AT_A_TIME:
        suite = _suite()
        if doc["multiple_choice"]:
            letters = _OF_LETTERS if "macro" in suite.families else ()
            return {"accuracy": 100.0 * item.correct(answer), **dict.fromkeys((*letters, "unreadable"), pair)}
        singly = replace(suite, families=suite.families & set(_SINGLY))
        figures = score(Benchmark("", (item,)), {item.key: answer}, singly).tasks[item.task]
    computed = {name: figures[name] for family in singly.families for name in FAMILIES[family]}
    return computed | {family: pair for family in _TOGETHER if family in suite.families}


@cache
def _suite() -> Suite:
    return build_suite(
        None, bertscore_model=os.environ.get(BERTSCORE_MODEL), sts_model=os.environ.get(STS_MODEL)
    )


def _of_task(pairs: Sequence[Mapping[str, Any]], *, name: str) -> float:
    """Return a metric of all answers of a task, as `m3llm eval` has it."""
    items = [
        Item("task", n, "", pair["reference"], choices=tuple(pair["choices"])) for n, pair in enumerate(pairs)
    ]
    answers = {item.key: pair["prediction"] for item, pair in zip(items, pairs, strict=True)}
    suite = replace(_suite(), families=_suite().families & {name if name in _TOGETHER else "macro"})
    return score(Benchmark("", tuple(items)), answers, suite).tasks["task"][name]


cider = partial(_of_task, name="cider")
bertscore = partial(_of_task, name="bertscore")
sts = partial(_of_task, name="sts")
macro_f1 = partial(_of_task, name="f1")
macro_recall = partial(_of_task, name="recall")
macro_precision = partial(_of_task, name="precision")
unreadable = partial(_of_task, name="unreadable")
