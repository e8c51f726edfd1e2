"""VQA-RAD, SLAKE and PathVQA: questions on single images with short answers.

As in the literature, closed questions are scored by accuracy, and open questions by exact match and by the
recall of the words of the reference, after normalization.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.eval.benchmarks.item import Benchmark, Figure, Item
from internvl_chat.eval.benchmarks.parquet import embedded_figure, find_parquet, parquet_rows
from internvl_chat.eval.benchmarks.reading import (
    EVERYTHING,
    Format,
    Request,
    Row,
    check_images,
    file_rows,
    find_image,
    read_rows,
    required_strings,
    with_indices,
)
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.logging import get_logger
from internvl_chat.utils.text import counted

logger = get_logger(__name__)

CLOSED, OPEN = "closed", "open"
_YES_NO = ("yes", "no")
_RAD_FILE, _RAD_IMAGES = "VQA_RAD Dataset Public.json", "VQA_RAD Image Folder"


def read_vqa_rad(data: Path, request: Request = EVERYTHING) -> Benchmark:
    """Read the test questions of VQA-RAD (Lau et al., 2018).

    The original release states which questions are closed. In parquet files, those with the answer yes or no
    count as closed.

    Args:
        data: folder with `VQA_RAD Dataset Public.json` and `VQA_RAD Image Folder/`, or with `test-*.parquet`.
        request: whether the image files are needed; both tasks are read.

    Raises:
        DataError: there is no such file, or it cannot be read.
        UsageError: pyarrow is not installed.
    """
    if not (file := data / _RAD_FILE).is_file():
        return _read_parquet("vqa-rad", data, f"{_RAD_FILE} or test-*.parquet")
    rows = _select(file_rows(RecordFile(file)), lambda raw: "test" in str(raw.get("phrase_type")))
    return _read_stated("vqa-rad", rows, "image_name", data / _RAD_IMAGES, request)


def read_slake(data: Path, request: Request = EVERYTHING) -> Benchmark:
    """Read the English questions in the `test.json` of SLAKE (Liu et al., 2021).

    Args:
        data: folder with `test.json` and the content of `imgs.zip` (`imgs/`).
        request: whether the image files are needed; both tasks are read.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    if not (file := data / "test.json").is_file():
        raise DataError("not SLAKE: no test.json", file=data)
    rows = list(file_rows(RecordFile(file)))
    english = _select(rows, lambda raw: raw.get("q_lang", "en") == "en")
    if others := len(rows) - len(english):
        logger.info("%s: %s not in English excluded", file, counted(others, "question"))
    return _read_stated("slake", english, "img_name", data / "imgs", request)


def read_path_vqa(data: Path, request: Request = EVERYTHING) -> Benchmark:
    """Read the `test-*.parquet` of PathVQA (He et al., 2020); closed questions have the answer yes or no.

    Args:
        data: folder of the dataset.
        request: ignored; both tasks and all images are read.

    Raises:
        DataError: there is no such file, or it cannot be read.
        UsageError: pyarrow is not installed.
    """
    return _read_parquet("pathvqa", data, "test-*.parquet")


def _select(rows: Iterable[Row], wanted: Callable[[Mapping[str, Any]], bool]) -> list[Row]:
    """Return the rows that are wanted, and all invalid rows, which are reported later."""

    def keep(row: Row) -> bool:
        try:
            raw = row.read()
        except DataError:
            return True
        return not isinstance(raw, Mapping) or wanted(raw)

    return [row for row in rows if keep(row)]


def _read_parquet(name: str, data: Path, expected: str) -> Benchmark:
    files = find_parquet(data, "test")
    if not files:
        raise DataError(f"not {name}: no {expected}", file=data)
    return _benchmark(name, read_rows(parquet_rows(files), Format(_parse_row, _task_of_row, "answer")))


def _read_stated(name: str, rows: Iterable[Row], key: str, folder: Path, request: Request) -> Benchmark:
    """Read rows that state whether their question is closed, and name their image file under a key."""
    parse = partial(_parse_stated, key=key, folder=folder, images=request.images)
    return _benchmark(name, read_rows(rows, Format(parse, _stated_task, "answer")))


def _benchmark(name: str, items: list[Item]) -> Benchmark:
    """Return the benchmark with the closed questions first."""
    items = with_indices(sorted(items, key=lambda item: item.task))
    return Benchmark(name, tuple(items), short_answers=True)


def _task_of_row(row: Mapping[str, Any]) -> str:
    return CLOSED if str(row.get("answer")).strip().lower() in _YES_NO else OPEN


def _stated_task(raw: Mapping[str, Any]) -> str:
    """Return the task of a row; the values of VQA-RAD have trailing spaces."""
    stated = str(raw.get("answer_type")).strip().lower()
    return stated if stated in (CLOSED, OPEN) else ""


def _parse_row(row: Mapping[str, Any]) -> Item:
    question, answer = required_strings(row, "question", "answer")
    return _item(_task_of_row(row), question, answer, embedded_figure(row, "image"))


def _parse_stated(raw: Mapping[str, Any], *, key: str, folder: Path, images: bool) -> Item:
    if not (task := _stated_task(raw)):
        raise DataError(f"'answer_type' must be OPEN or CLOSED, found {raw.get('answer_type')!r:.40}")
    if isinstance(raw.get("answer"), int | float):
        raw = {**raw, "answer": str(raw["answer"])}
    name, question, answer = required_strings(raw, key, "question", "answer")
    check_images(raw, (key, "question"), [name], question)
    return _item(task, question, answer, Figure(name, path=find_image(name, [folder], required=images)))


def _item(task: str, question: str, answer: str, figure: Figure) -> Item:
    """Return an item; closed questions have the options yes and no if one of them is the answer."""
    answer = answer.strip()
    choices = _YES_NO if task == CLOSED and answer.lower() in _YES_NO else ()
    return Item(task, 0, question.strip(), answer, (figure,), choices)
