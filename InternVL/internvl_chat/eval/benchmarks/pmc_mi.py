"""PMC-MI-Bench, and custom benchmarks in its format.

A file is a JSON array or JSONL. Each object has `question`, `gt` (reference answer; for multiple choice, its
letter), `images` (file names) and `image_indices` (labels of the images in the question, such as `Fig-0`).
Text-only questions have no `images`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from internvl_chat.constants import IMAGE_PLACEHOLDER
from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.eval.benchmarks.answers import names_option
from internvl_chat.eval.benchmarks.item import Benchmark, Figure, Item
from internvl_chat.eval.benchmarks.reading import (
    EVERYTHING,
    Format,
    Request,
    check_images,
    check_keys,
    file_rows,
    find_image,
    optional_string,
    read_rows,
    required_strings,
    string_list,
    unknown_tasks,
)
from internvl_chat.metrics.multiple_choice import split_choices
from internvl_chat.utils.errors import DataError, UsageError

T = TypeVar("T")

FILES = {
    "puretext": "puretextQA_benchmark.json",
    "multi-choice": "multiplechoiceVQA_benchmark.json",
    "single-subimageVQA": "single_subimageVQA_benchmark.json",
    "bboxVQA": "spatial_relation_benchmark.json",
    "compoundVQA": "compound-imageVQA_benchmark.json",
    "multisubimageVQA": "multiplesubimageVQA_benchmark.json",
}
_KEYS = ("question", "gt", "images", "image_indices")
_QUESTION_FOLDERS = (".", "benchmark", "benchmark_data")
_IMAGE_FOLDERS = ("images", "benchmark_images", ".")


def read_pmc_mi(data: Path, request: Request = EVERYTHING) -> Benchmark:
    """Read the six published files of PMC-MI-Bench.

    Images are searched in the folder of the files, its parent, and `images/` and `benchmark_images/` in both.

    Args:
        data: folder of the files, or the parent of a folder `benchmark/` or `benchmark_data/` with the files.
        request: tasks to read, and whether the images must exist.

    Raises:
        DataError: a file is missing.
        UsageError: a task is unknown.
    """
    names = _wanted(FILES, request, "pmc-mi")
    folders = [data / name for name in _QUESTION_FOLDERS]
    folder = next((f for f in folders if any((f / name).is_file() for name in FILES.values())), data)
    missing = [name for name in names.values() if not (folder / name).is_file()]
    if missing:
        raise DataError(f"PMC-MI-Bench is incomplete: missing {', '.join(missing)}", file=folder)
    benchmark = _read("pmc-mi", {task: folder / name for task, name in names.items()}, folder, request)
    return replace(benchmark, other_tasks=tuple(FILES.keys() - names.keys()))


def read_folder(folder: Path, request: Request = EVERYTHING) -> Benchmark:
    """Read a custom benchmark: each `.json` or `.jsonl` file of a folder is a task.

    The task name is the file name without `_benchmark`; PMC-MI-Bench files keep their task names.

    Args:
        folder: folder of the files.
        request: tasks to read, and whether the images must exist.

    Raises:
        DataError: the folder contains no such file, or two files result in the same task name.
        UsageError: a task is unknown.
    """
    published = {name: task for task, name in FILES.items()}
    files: dict[str, Path] = {}
    for file in sorted(f for f in folder.iterdir() if f.suffix in (".json", ".jsonl")):
        task = published.get(file.name, file.stem.removesuffix("_benchmark"))
        if task in files:
            raise DataError(
                f"{files[task].name} and {file.name} have the same task name, {task}", file=folder
            )
        files[task] = file
    if not files:
        raise DataError("no .json or .jsonl file with questions", file=folder)
    name = folder.resolve().name
    wanted = _wanted(files, request, name)
    benchmark = _read(name, wanted, folder, request)
    return replace(benchmark, other_tasks=tuple(files.keys() - wanted.keys()))


def _wanted(files: Mapping[str, T], request: Request, benchmark: str) -> dict[str, T]:
    """Return the files of the requested tasks.

    Raises:
        UsageError: a task is unknown.
    """
    if unknown := [task for task in request.tasks or () if task not in files]:
        raise UsageError(unknown_tasks(unknown, benchmark, files))
    return {task: file for task, file in files.items() if request.wants(task)}


def _read(name: str, files: Mapping[str, Path], folder: Path, request: Request) -> Benchmark:
    roots = [root / name for root in (folder, folder.parent) for name in _IMAGE_FOLDERS]
    items: list[Item] = []
    for task, file in files.items():
        parse = partial(_parse, task=task, roots=roots, images=request.images)
        rule = Format(parse, partial(_task, task), answer_key="gt", answers="letter")
        items += read_rows(file_rows(RecordFile(file)), rule)
    return Benchmark(name, tuple(items))


def _task(task: str, raw: Mapping[str, Any]) -> str:
    return task


def _parse(raw: Mapping[str, Any], *, task: str, roots: Sequence[Path], images: bool) -> Item:
    [question], answer = required_strings(raw, "question"), optional_string(raw, "gt")
    if IMAGE_PLACEHOLDER in question:
        raise DataError(
            f"the question must not contain {IMAGE_PLACEHOLDER}, because its images are inserted before it"
        )
    names, labels = string_list(raw, "images"), string_list(raw, "image_indices")
    if names and len(names) != len(labels):
        raise DataError(f"{len(names)} 'images', but {len(labels)} 'image_indices'")
    check_images(raw, _KEYS, names, question)
    check_keys(raw, _KEYS)
    # Text-only questions may have labels without images.
    labeled = zip(names, labels, strict=False)
    figures = tuple(Figure(name, label, find_image(name, roots, required=images)) for name, label in labeled)
    choices = split_choices(question)
    is_letter = len(answer.strip()) == 1 and answer.strip().isalpha()
    if not is_letter and not names_option(answer, choices) and task != "multi-choice":
        choices = ()
    if task == "multi-choice" and not choices:
        raise DataError("the question does not list options (A. ... B. ...)")
    return Item(task, 0, question, answer, figures, choices)
