"""MedFrameQA (Yu et al., 2025): multiple-choice questions on two to five video frames."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_chat.eval.benchmarks.item import Benchmark, Item
from internvl_chat.eval.benchmarks.parquet import embedded_figure, find_parquet, image_bytes, parquet_rows
from internvl_chat.eval.benchmarks.reading import (
    EVERYTHING,
    Format,
    Request,
    choice_item,
    optional_string,
    read_rows,
    required_strings,
    string_list,
    with_indices,
)
from internvl_chat.utils.errors import DataError

_IMAGES = tuple(f"image_{number}" for number in range(1, 6))


def read_medframeqa(data: Path, request: Request = EVERYTHING) -> Benchmark:
    """Read `data/test-*.parquet`; the tasks are numbers of images per question.

    The images are labeled `Image 1`, `Image 2`, ..., because questions refer to them by number.

    Args:
        data: folder of the dataset.
        request: ignored; all tasks and images are read.

    Raises:
        DataError: there is no parquet file, or it cannot be read.
        UsageError: pyarrow is not installed.
    """
    files = find_parquet(data, "test")
    if not files:
        raise DataError("not MedFrameQA: no test-*.parquet", file=data)
    items = read_rows(parquet_rows(files), Format(_parse, _task, "correct_answer", answers="letter"))
    items.sort(key=lambda item: item.task)
    return Benchmark("medframeqa", tuple(with_indices(items)), pooled=True)


def _image_keys(row: Mapping[str, Any]) -> list[str]:
    """Return the keys of the images in a row."""
    return [key for key in _IMAGES if image_bytes(row.get(key))]


def _task(row: Mapping[str, Any]) -> str:
    return f"{len(_image_keys(row))} images"


def _parse(row: Mapping[str, Any]) -> Item:
    [question], answer = required_strings(row, "question"), optional_string(row, "correct_answer")
    keys = _image_keys(row)
    if len(keys) < 2 or keys != list(_IMAGES[: len(keys)]):
        raise DataError(f"expected 2 to 5 images from image_1 on, found {', '.join(keys) or 'none'}")
    figures = tuple(embedded_figure(row, key, f"Image {number}") for number, key in enumerate(keys, 1))
    choices = string_list(row, "options")
    if len(choices) < 2:
        raise DataError("'options' must be a list of at least two options")
    return choice_item(_task(row), question, answer, figures, choices)
