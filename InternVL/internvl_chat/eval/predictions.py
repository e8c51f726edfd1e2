"""Answers on disk: written one by one, so that an evaluation that was ended goes on where it stopped.

Every process appends to a file of its own: the first to `predictions.jsonl`, the others to
`predictions.1.jsonl` and so on. In the end all are brought into the benchmark's order in the first. What
the answers were made with is in `evaluation.json`.
"""

import fcntl
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from internvl_chat.eval.benchmarks.item import Item, Key
from internvl_chat.eval.benchmarks.reading import refuse
from internvl_chat.model.io.folders import read_companions
from internvl_chat.model.io.weights import weight_files
from internvl_chat.utils.errors import DataError, UsageError, format_problems

PREDICTIONS = "predictions.jsonl"
SETTINGS = "evaluation.json"
# Where the checkpoint is says nothing of what it is: its digest does.
_ONLY_TOLD = ("model",)
# Of a task, how many missing answers a message names.
_MOST_INDICES = 5


class PredictionLog:
    """The answers of one process, appended to its file; those of all processes, read when it is opened.

    Args:
        folder: of the evaluation; is made if need be.
        settings: what decides the answers, by names that a user understands.
        process: this process's number.

    Raises:
        UsageError: the folder holds answers of another evaluation, or another process is writing to it.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], process: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _require_same(folder, settings)
        self._stream = _open_own(folder / _part(process))
        self.done = {key: row["prediction"] for key, row in read_parts(folder).items()}

    def __enter__(self) -> "PredictionLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def append(self, item: Item, prediction: str) -> None:
        """Write an answer, and see it to the disk."""
        self._stream.write(json.dumps(_row(item, prediction), ensure_ascii=False) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.done[item.key] = prediction


def _part(process: int) -> str:
    return f"predictions.{process}.jsonl" if process else PREDICTIONS


def _row(item: Item, prediction: str) -> dict[str, Any]:
    return {
        "task": item.task,
        "index": item.index,
        "question": item.question,
        "images": [figure.name for figure in item.figures],
        "prediction": prediction,
        "reference": item.reference,
    }


def _require_same(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a new evaluation, or compare them with those of the one to be continued."""
    file = folder / SETTINGS
    answered = any(
        folder.glob("predictions*.jsonl")
    )  # before the settings, which other processes write first
    if not file.is_file():
        if answered:
            raise UsageError(
                f"--out {folder}: has answers, but no {SETTINGS} that says of what; choose another"
            )
        partial = file.with_name(f".{SETTINGS}.{os.getpid()}")
        partial.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(file)
        return
    try:
        earlier = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"not the settings of an evaluation: {error}", file=file) from None
    differences = [
        f"{name} was {earlier.get(name)!r}, and is {settings.get(name)!r}"
        for name in dict.fromkeys([*earlier, *settings])
        if earlier.get(name) != settings.get(name) and name not in _ONLY_TOLD
    ]
    if differences:
        text = format_problems(differences)
        raise UsageError(f"--out {folder}: holds the answers of another evaluation; choose another. {text}")


def _open_own(file: Path) -> IO[str]:
    """Open a file to append to, without a line that an earlier process left unfinished, and lock it."""
    stream = file.open("a+", encoding="utf-8")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        raise UsageError(f"{file}: another evaluation is writing to it; wait for it or end it") from None
    content = file.read_bytes()
    os.truncate(file, content.rfind(b"\n") + 1)
    return stream


def read_parts(folder: Path) -> dict[Key, dict[str, Any]]:
    """Return the rows of all processes' files by item.

    Raises:
        DataError: a line is none of ours.
    """
    rows: dict[Key, dict[str, Any]] = {}
    for file in sorted(folder.glob("predictions*.jsonl")):
        for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
            if line.endswith(b"\n"):  # else its process was ended, or is about to finish it
                row = _parse_row(line, file, number)
                rows[row["task"], row["index"]] = row
    return rows


def bring_together(folder: Path, order: Iterable[Item]) -> dict[Key, str]:
    """Write the answers of all processes into one file in the benchmark's order; returns them.

    Raises:
        DataError: a line is none of ours.
    """
    rows = read_parts(folder)
    ordered = [rows[item.key] for item in order if item.key in rows]
    whole = folder / f".{PREDICTIONS}"
    with whole.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in ordered)
        stream.flush()
        os.fsync(stream.fileno())
    whole.replace(folder / PREDICTIONS)
    for file in folder.glob("predictions.*.jsonl"):
        file.unlink()
    return {key: row["prediction"] for key, row in rows.items()}


def read_answers(file: Path, items: Sequence[Item], known: Sequence[Item]) -> dict[Key, str]:
    """Read answers made elsewhere: one object a line with `task`, `index` (from 0) and `prediction`.

    Args:
        file: may also have answers to other items of the benchmark.
        items: that must be answered.
        known: all items of the benchmark.

    Raises:
        DataError: lines cannot be used, or answers are missing, double or of no item; names them all.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", file=file) from None
    keys = {item.key for item in known}
    answers: dict[Key, str] = {}
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
        if key in answers or key not in keys:
            what = "is answered twice" if key in answers else "is no item of the benchmark"
            problems.append(str(DataError(f"{key[0]} {key[1]} {what}", file=file, line=number)))
        answers[key] = row["prediction"]
    problems += [f"{file}: {problem}" for problem in _unanswered(items, answers)]
    refuse(problems)
    return answers


def _unanswered(items: Iterable[Item], answers: Mapping[Key, str]) -> Iterator[str]:
    """Yield a sentence for each task of which answers are missing."""
    missing: dict[str, list[int]] = defaultdict(list)
    for item in items:
        if item.key not in answers:
            missing[item.task].append(item.index)
    for task, indices in missing.items():
        shown = ", ".join(map(str, indices[:_MOST_INDICES]))
        more = f" and {len(indices) - _MOST_INDICES:,} more" if len(indices) > _MOST_INDICES else ""
        yield f"{task} has no answer for index {shown}{more}"


def _parse_row(line: bytes, file: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
        valid = isinstance(row["task"], str) and isinstance(row["prediction"], str)
        valid = valid and isinstance(row["index"], int) and not isinstance(row["index"], bool)
    except (ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        raise DataError(
            "must be an object with the texts 'task' and 'prediction' and the whole number 'index'",
            file=file,
            line=number,
        )
    return row


def checkpoint_digest(folder: Path) -> str:
    """Return the SHA-256 of what decides a checkpoint's answers: weights or adapters, settings, tokenizer."""
    total = hashlib.sha256()
    adapter = folder / "adapter_model.safetensors"
    weights = [adapter] if adapter.is_file() else weight_files(folder)
    for file in [*weights, folder / "config.json", folder / "base_model.json"]:
        if file.is_file():
            with file.open("rb") as stream:
                total.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    for name, content in read_companions(folder).items():
        total.update(f"{name}:{hashlib.sha256(content).hexdigest()}\n".encode())
    return total.hexdigest()


def items_digest(items: Iterable[Item], system: Mapping[str, str | None]) -> str:
    """Return the SHA-256 of what is asked: questions, names of figures, right answers, system texts."""
    total = hashlib.sha256()
    for item in items:
        asked = [_row(item, ""), item.text, system[item.task]]
        total.update(json.dumps(asked, ensure_ascii=False).encode())
    return total.hexdigest()
