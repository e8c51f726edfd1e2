"""Predictions on disk, written one by one so that an interrupted evaluation can resume.

Each rank appends to a separate file: rank 0 to `predictions.jsonl`, rank n to `predictions.n.jsonl`. At the
end, all files are merged into `predictions.jsonl` in benchmark order. `evaluation.json` stores the settings
that affect the answers.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from internvl_chat.constants import STANDARD_PROTOCOL
from internvl_chat.eval.benchmarks.item import Figure, Item, Key
from internvl_chat.eval.benchmarks.reading import raise_problems
from internvl_chat.inference.engine import Reply, is_truncated
from internvl_chat.model.io.folders import is_model_file, read_auxiliary_files
from internvl_chat.model.io.weights import weight_files
from internvl_chat.utils.errors import DataError, UsageError
from internvl_chat.utils.files import (
    append_json_line,
    file_sha256,
    open_for_appending,
    sha256,
    write_json,
    write_json_lines,
)
from internvl_chat.utils.text import counted

PREDICTIONS = "predictions.jsonl"
SETTINGS = "evaluation.json"
# Not compared, because a checkpoint may have moved; it is identified by its digest.
_INFORMATIONAL = ("model",)
# Compared only if more items are to be answered (see `PredictionLog.check_dtype`).
_DTYPE = "dtype"
# Compared for each task, because a later run may add tasks.
_PER_TASK = ("questions", "images")
_MAX_INDICES_SHOWN = 5


class PredictionLog:
    """Prediction file of one rank.

    `done` maps items to answers. It contains all answers that were in the folder when the file was opened,
    and those that this rank has added since.

    Args:
        folder: output folder of the evaluation, created if needed.
        settings: settings that affect the answers.

    Raises:
        UsageError: the folder belongs to a different evaluation, or another process is writing to it.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], rank: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._settings = folder, settings
        self._stored = _check_settings(folder, settings)
        self._stream = open_for_appending(folder / (f"predictions.{rank}.jsonl" if rank else PREDICTIONS))
        self.done = {key: row["prediction"] for key, row in read_predictions(folder).items()}

    def __enter__(self) -> "PredictionLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def check_dtype(self) -> None:
        """Check that the model has the dtype with which the evaluation started.

        Raises:
            UsageError: the dtype differs, so new answers would not be comparable.
        """
        before, now = (values.get(_DTYPE) for values in (self._stored, self._settings))
        if before and before != now:
            raise UsageError(
                f"--out {self._folder}: this evaluation started in {before} and would continue in {now}; "
                "continue on the same type of device (--device), or choose a different folder"
            )

    def append(self, item: Item, prediction: str) -> None:
        """Append a prediction to the file and sync it to disk."""
        protocol = self._settings.get("protocol", STANDARD_PROTOCOL)
        more = {"truncated": is_truncated(prediction), "protocol": protocol}
        append_json_line(self._stream, _row(item, prediction) | more)
        self.done[item.key] = prediction


def _row(item: Item, prediction: str) -> dict[str, Any]:
    return {
        "task": item.task,
        "index": item.index,
        "question": item.question,
        "images": [figure.name for figure in item.figures],
        "prediction": prediction,
        "reference": item.reference,
    }


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Write the settings of a new evaluation; when resuming, compare them with those in the folder.

    Returns:
        The settings that are then stored in the folder.
    """
    file = folder / SETTINGS
    # Check this before `is_file`: another rank may write the settings and its first answer in between.
    has_predictions = any(folder.glob("predictions*.jsonl"))
    if not file.is_file():
        if has_predictions:
            raise UsageError(
                f"--out {folder}: contains predictions but no {SETTINGS}; choose a different folder"
            )
        write_json(file, settings)
        return dict(settings)
    try:
        previous = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"invalid evaluation settings: {error}", file=file) from None
    old, new = ({"protocol": STANDARD_PROTOCOL} | dict(values) for values in (previous, settings))
    differences = [
        f"{name} was {old.get(name)!r}, now {new.get(name)!r}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name) and name not in (*_INFORMATIONAL, _DTYPE, *_PER_TASK)
    ]
    merged = dict(previous)
    for name in _PER_TASK:
        earlier, now = (values.get(name) or {} for values in (previous, settings))
        differences += [
            f"the {name} of {task} have changed" for task in now if earlier.get(task, now[task]) != now[task]
        ]
        merged |= {name: earlier | now} if now else {}
    if differences:
        raise UsageError(
            f"--out {folder}: contains answers from a different evaluation ({'; '.join(differences)}); "
            "choose a different folder"
        )
    if merged != previous:  # new tasks of the same benchmark
        write_json(file, merged)
    return merged


def read_predictions(folder: Path) -> dict[Key, dict[str, Any]]:
    """Return the rows in the prediction files of all ranks, keyed by item.

    Raises:
        DataError: a line is not a valid prediction.
    """
    rows: dict[Key, dict[str, Any]] = {}
    for file in sorted(folder.glob("predictions*.jsonl")):
        for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
            if line.endswith(b"\n"):  # skip a line that is still being written or was cut off
                row = _parse_row(line, file, number)
                rows[row["task"], row["index"]] = row
    return rows


def merge_predictions(folder: Path, order: Iterable[Item]) -> dict[Key, Reply]:
    """Merge the predictions of all ranks into one file, in benchmark order; return the answers by item.

    Raises:
        DataError: a line is not a valid prediction.
    """
    rows = read_predictions(folder)
    write_json_lines(folder / PREDICTIONS, [rows[item.key] for item in order if item.key in rows])
    for file in folder.glob("predictions.*.jsonl"):
        file.unlink()
    return {key: _reply(row) for key, row in rows.items()}


def _reply(row: Mapping[str, Any]) -> Reply:
    return Reply(row["prediction"], truncated=row.get("truncated") is True)


def read_answers(
    file: Path,
    items: Sequence[Item],
    known: Sequence[Item],
    tasks: Collection[str] | None = None,
    protocol: str = STANDARD_PROTOCOL,
) -> dict[Key, Reply]:
    """Read answers that were generated elsewhere.

    Args:
        file: JSONL file with `task`, `index` (0-based) and `prediction`. It may contain answers to other
            items of the benchmark.
        items: items that need an answer.
        known: all items of the benchmark.
        tasks: ignore answers to all other tasks (default: ignore none).
        protocol: expected protocol; lines that do not state one are assumed to have it.

    Raises:
        DataError: a line is invalid, or an answer is missing, given twice, of a different protocol, or does
            not match an item; see `raise_problems`.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", file=file) from None
    by_key = {item.key: item for item in known}
    answers: dict[Key, Reply] = {}
    protocols: Counter[str] = Counter()
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _parse_row(line, file, number)
        except DataError as error:
            problems.append(str(error))
            continue
        key = (row["task"], row["index"])
        if tasks is not None and key[0] not in tasks:
            continue
        problem = "is answered twice" if key in answers else _mismatch(row, by_key.get(key))
        if problem:
            problems.append(str(DataError(f"{key[0]} {key[1]} {problem}", file=file, line=number)))
        answers[key] = _reply(row)
        protocols[str(row.get("protocol", protocol))] += 1
    problems += [
        f"{file}: {counted(number, 'answer')} with --protocol {other}, not {protocol}"
        for other, number in protocols.items()
        if other != protocol
    ]
    problems += [f"{file}: {problem}" for problem in _missing_answers(items, answers)]
    raise_problems(problems)
    return answers


def _mismatch(row: Mapping[str, Any], item: Item | None) -> str | None:
    """Return why a row is not an answer to the item, or None if it is. Its `question` is optional."""
    if item is None:
        return "is not an item of the benchmark"
    question = row.get("question")
    if isinstance(question, str) and not item.problem and question != item.question:
        return f"has a different question from the benchmark: {question!r:.80}"
    return None


def _missing_answers(items: Iterable[Item], answers: Mapping[Key, str]) -> Iterator[str]:
    """Yield a message for each task with missing answers."""
    missing: dict[str, list[int]] = defaultdict(list)
    for item in items:
        if item.key not in answers:
            missing[item.task].append(item.index)
    for task, indices in missing.items():
        shown = ", ".join(map(str, indices[:_MAX_INDICES_SHOWN]))
        rest = len(indices) - _MAX_INDICES_SHOWN
        yield f"{task} has no answer for index {shown}{f' and {rest:,} more' if rest > 0 else ''}"


def _parse_row(line: bytes, file: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
        valid = isinstance(row["task"], str) and isinstance(row["prediction"], str)
        valid = valid and isinstance(row["index"], int) and not isinstance(row["index"], bool)
    except (ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        raise DataError(
            "must be an object with strings 'task' and 'prediction' and an integer 'index'",
            file=file,
            line=number,
        )
    return row


def checkpoint_digest(folder: Path) -> str:
    """Return a SHA-256 of all checkpoint files that affect the answers."""
    digest = hashlib.sha256()
    adapter = folder / "adapter_model.safetensors"
    weights = [adapter] if adapter.is_file() else weight_files(folder)
    for file in [*weights, folder / "config.json", folder / "base_model.json"]:
        if file.is_file():
            digest.update(f"{file.name}:{file_sha256(file)}\n".encode())
    for name, content in read_auxiliary_files(folder).items():
        if is_model_file(name):
            digest.update(f"{name}:{sha256(content)}\n".encode())
    return digest.hexdigest()


def task_digests(items: Iterable[Item], system: Mapping[str, str | None]) -> dict[str, str]:
    """Return the digest of the items of each task, keyed by task (see `items_digest`)."""
    by_task: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_task[item.task].append(item)
    return {task: items_digest(of_task, system) for task, of_task in by_task.items()}


def image_digests(items: Sequence[Item]) -> dict[str, str]:
    """Return a SHA-256 of all images of each task, keyed by task; tasks without images are omitted."""
    figures = {(f.path or f.content): f for item in items for f in item.figures}
    with ThreadPoolExecutor() as pool:
        hashes = dict(zip(figures, pool.map(_image_sha256, figures.values()), strict=True))
    digests: dict[str, Any] = {}
    for item in items:
        for figure in item.figures:
            digest = digests.setdefault(item.task, hashlib.sha256())
            digest.update(f"{item.index}:{hashes[figure.path or figure.content]}\n".encode())
    return {task: digest.hexdigest() for task, digest in digests.items()}


def _image_sha256(figure: Figure) -> str:
    """Return the SHA-256 of an image, or "" if the file cannot be read, which is reported later."""
    if figure.path is None:
        return sha256(figure.content or b"")
    try:
        return file_sha256(figure.path)
    except OSError:
        return ""


def items_digest(items: Iterable[Item], system: Mapping[str, str | None]) -> str:
    """Return a SHA-256 of the questions, image names, references and system prompts of items."""
    digest = hashlib.sha256()
    for item in items:
        content = [_row(item, ""), item.text, system[item.task]]
        digest.update(json.dumps(content, ensure_ascii=False).encode())
    return digest.hexdigest()
