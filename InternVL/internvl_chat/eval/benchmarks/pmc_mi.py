"""PMC-MI-Bench, and any folder of files in its format.

A file is a JSON array (or JSONL) of objects with `question`, `gt` (reference answer; the letter for multiple
choice), `images` (file names) and `image_indices` (labels of the images in the question, such as `Fig-0`).
Text-only questions have no `images`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from internvl_chat.constants import IMAGE_PLACEHOLDER
from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.eval.benchmarks.item import Benchmark, Figure, Item
from internvl_chat.eval.benchmarks.reading import (
    check_images,
    correct_letter,
    find_image,
    read_items,
    required_strings,
    string_list,
)
from internvl_chat.metrics.multiple_choice import split_choices
from internvl_chat.utils.errors import DataError

FILES = {
    "puretext": "puretextQA_benchmark.json",
    "multi-choice": "multiplechoiceVQA_benchmark.json",
    "single-subimageVQA": "single_subimageVQA_benchmark.json",
    "bboxVQA": "spatial_relation_benchmark.json",
    "compoundVQA": "compound-imageVQA_benchmark.json",
    "multisubimageVQA": "multiplesubimageVQA_benchmark.json",
}
_QUESTION_FOLDERS = (".", "benchmark", "benchmark_data")
_IMAGE_FOLDERS = ("images", "benchmark_images", ".")


def read_pmc_mi(data: Path) -> Benchmark:
    """Read the six published files.

    Args:
        data: folder of the files, or the parent of `benchmark/` or `benchmark_data/`. The images are in the
            folder of the files, or in `images/` or `benchmark_images/` inside or next to it.

    Raises:
        DataError: files are missing or items are invalid; lists all of them.
    """
    folders = [data / name for name in _QUESTION_FOLDERS]
    folder = next((f for f in folders if any((f / name).is_file() for name in FILES.values())), data)
    missing = [name for name in FILES.values() if not (folder / name).is_file()]
    if missing:
        raise DataError(f"PMC-MI-Bench is incomplete: no {', '.join(missing)}", file=folder)
    return _read("pmc-mi", {task: folder / name for task, name in FILES.items()}, folder)


def read_folder(folder: Path) -> Benchmark:
    """Read a custom benchmark: each `.json` or `.jsonl` file of a folder is a task.

    The task has the name of the file without `_benchmark`; published files keep their task names.

    Raises:
        DataError: there is no such file, two files have the same task, or items are invalid.
    """
    published = {name: task for task, name in FILES.items()}
    files: dict[str, Path] = {}
    for file in sorted(f for f in folder.iterdir() if f.suffix in (".json", ".jsonl")):
        task = published.get(file.name, file.stem.removesuffix("_benchmark"))
        if task in files:
            raise DataError(f"{files[task].name} and {file.name} are both task {task}", file=folder)
        files[task] = file
    if not files:
        raise DataError("no .json or .jsonl file with questions", file=folder)
    return _read(folder.resolve().name, files, folder)


def _read(name: str, files: Mapping[str, Path], folder: Path) -> Benchmark:
    roots = [root / name for root in (folder, folder.parent) for name in _IMAGE_FOLDERS]
    parsers = [(RecordFile(file), partial(_parse, task=task, roots=roots)) for task, file in files.items()]
    return Benchmark(name, tuple(read_items(parsers)))


def _parse(raw: Mapping[str, Any], *, task: str, roots: Sequence[Path]) -> Item:
    question, answer = required_strings(raw, "question", "gt")
    if IMAGE_PLACEHOLDER in question:
        raise DataError(f"the question contains {IMAGE_PLACEHOLDER}, but its images precede it")
    names, labels = string_list(raw, "images"), string_list(raw, "image_indices")
    if names and len(names) != len(labels):
        raise DataError(f"{len(names)} 'images', but {len(labels)} 'image_indices'")
    check_images(raw, ("question", "gt", "images", "image_indices"), names, question)
    # Text-only questions may have labels without images.
    labelled = zip(names, labels, strict=False)
    figures = tuple(Figure(name, label, find_image(name, roots)) for name, label in labelled)
    is_letter = len(answer.strip()) == 1 and answer.strip().isalpha()
    choices = split_choices(question) if is_letter or task == "multi-choice" else ()
    if choices or task == "multi-choice":
        return Item(task, 0, question, correct_letter(answer, choices), figures, choices)
    return Item(task, 0, question, answer, figures)
