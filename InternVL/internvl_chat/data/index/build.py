"""What every record of the data sets is like, known exactly before training: how long, or why it is unusable.

Texts are tokenised and image headers read once, by several processes; later runs read the outcome from a
cache. What is measured here is what `RecordSet.load` makes, because both follow the same plan.
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from internvl_chat.data.encode.conversation import plain_backend
from internvl_chat.data.encode.encoder import Measured
from internvl_chat.data.index.cache import (
    Lengths,
    RecordIndex,
    cache_file,
    default_cache,
    read_index,
    write_index,
)
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.problems import Problem, show_id
from internvl_chat.data.sources.shown_images import ShownImage, ShownImages
from internvl_chat.data.sources.skip_policy import raise_problems
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

_CHUNK = 256
# Starting a process takes as long as measuring some thousands of records, and about 400 MB.
_RECORDS_PER_WORKER = 5000
_DECODED_PER_WORKER = 250
_MOST_WORKERS = 16
# Settings that change no length.
_NOT_MEASURED = ("normalize_type", "pad2square")


def index_lengths(
    sets: Sequence[RecordSet], *, workers: int | None = None, cache: Path | None = None
) -> list[Lengths]:
    """Return the lengths of all records that are used of each set, each record once, in the file's order.

    Args:
        sets: the data sets.
        workers: of `index_records`.
        cache: of `index_records`.

    Raises:
        DataError: records cannot be used. It lists the first of them.
    """
    indexes = index_records(sets, workers=workers, cache=cache)
    raise_problems([problem for index in indexes for problem in index.problems])
    return [index.lengths for index in indexes]


def index_records(
    sets: Sequence[RecordSet],
    *,
    decode: bool = False,
    workers: int | None = None,
    cache: Path | None = None,
) -> list[RecordIndex]:
    """Return what is known of all records that are used of each set, each once, in the file's order.

    A cached record is looked at again where it could not be used, for its image may have been repaired, and
    where an image file has another size or time than it had, or is gone. The others are trusted as long as
    annotation file, root, tokenizer and preprocessing are the same.

    Args:
        sets: the data sets.
        decode: also decode every image; else only those whose file does not end as it should.
        workers: processes that look; by default one a core, and none beside this one for few records.
        cache: folder of what is kept; by default `default_cache()`.
    """
    files = _cache_files(sets, cache or default_cache())
    found: list[RecordIndex] = []
    tasks: list[_Task] = []
    for number, (file, records) in enumerate(zip(files, sets, strict=True)):
        known = read_index(file, records.num_distinct)
        if known is None or (decode and not known.decoded):
            tasks.append(_Task(number, np.arange(records.num_distinct), decode))
            known = _nothing_known(records.num_distinct, decode)
        elif len(again := np.union1d(known.unusable, known.images.stale(records.spec.root))):
            tasks.append(_Task(number, again.astype(np.int64), known.decoded))
        found.append(known)
    for task, outcome in zip(tasks, _examine(sets, tasks, workers), strict=True):
        known = found[task.set_number]
        updated = _update(known, task, outcome)
        file = files[task.set_number]
        if known.lengths.file is None or not updated.same_as(known):
            kept = write_index(file, updated)
            lengths = dataclasses.replace(updated.lengths, file=file if kept else None)
            updated = dataclasses.replace(updated, lengths=lengths)
        found[task.set_number] = updated
    return found


def _nothing_known(num_records: int, decode: bool) -> RecordIndex:
    none = np.zeros(num_records, np.uint64)
    columns = {name: np.zeros(num_records, np.int32) for name in Measured._fields}
    return RecordIndex(Lengths(**columns), [None] * num_records, none, none, [], ShownImages.none(), decode)


def _cache_files(sets: Sequence[RecordSet], folder: Path) -> list[Path]:
    """Return each set's cache file, named by everything that its numbers depend on but the images."""
    tokenizers = {id(s.encoder.tokenizer): s.encoder.tokenizer for s in sets}
    digests = {key: tokenizer_digest(tokenizer) for key, tokenizer in tokenizers.items()}
    files = []
    for records in sets:
        status = records.spec.annotation.stat()
        preprocessing = dataclasses.asdict(records.encoder.preprocessing)
        facts = {
            "data set": records.spec.name,
            "annotation": str(records.spec.annotation.absolute()),
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "root": str(records.spec.root.absolute()),
            "records": records.num_distinct,
            "preprocessing": {k: v for k, v in preprocessing.items() if k not in _NOT_MEASURED},
            "truncate_text": records.encoder.truncate_text,
            "tokenizer": digests[id(records.encoder.tokenizer)],
        }
        files.append(cache_file(folder, facts))
    return files


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return a hash of what decides the ids of a text: vocabulary, merges, special tokens."""
    if tokenizer is None:
        return "none"
    if tokenizer.is_fast:
        text = plain_backend(tokenizer).to_str()
    else:
        special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        text = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab(), special], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class _Task(NamedTuple):
    """Records of one set that are to be looked at."""

    set_number: int
    indices: np.ndarray
    decode: bool


class _Outcome(NamedTuple):
    """What became of a task: a row of `Measured`, id, hashes and images of each record; problems of some."""

    rows: np.ndarray
    ids: list[str | None]
    hashes: np.ndarray
    images: list[tuple[ShownImage, ...]]
    problems: list[Problem]


def _update(known: RecordIndex, task: _Task, outcome: _Outcome) -> RecordIndex:
    """Return an index in which the records of a task are replaced by what became of them."""
    rows = np.stack(list(known.lengths.columns.values()), axis=1)
    rows[task.indices] = outcome.rows
    hashes = np.stack([known.names, known.contents], axis=1)
    hashes[task.indices] = outcome.hashes
    ids = list(known.ids)
    for index, identity in zip(task.indices.tolist(), outcome.ids, strict=True):
        ids[index] = identity
    again = set(task.indices.tolist())
    problems = [problem for problem in known.problems if problem.index not in again] + outcome.problems
    columns = dict(zip(Measured._fields, np.ascontiguousarray(rows.T), strict=True))
    names, contents = np.ascontiguousarray(hashes.T)
    return RecordIndex(
        Lengths(**columns, file=known.lengths.file), ids, names, contents,
        sorted(problems, key=lambda problem: problem.index or 0),
        known.images.replace(task.indices, outcome.images), task.decode,
    )  # fmt: skip


def _examine(sets: Sequence[RecordSet], tasks: Sequence[_Task], workers: int | None) -> Iterator[_Outcome]:
    """Yield what becomes of each task."""
    total = sum(len(task.indices) for task in tasks)
    if workers is None:
        each = _DECODED_PER_WORKER if any(task.decode for task in tasks) else _RECORDS_PER_WORKER
        workers = min(available_cores(), _MOST_WORKERS, total // each)
    parts = [
        [task._replace(indices=task.indices[i : i + _CHUNK]) for i in range(0, len(task.indices), _CHUNK)]
        for task in tasks
    ]
    bar = tqdm(total=total, desc="checking", unit="record", delay=2, file=sys.stderr, dynamic_ncols=True)
    with bar, _outcomes(sets, [part for group in parts for part in group], workers) as outcomes:
        for group in parts:
            done = []
            for _ in group:
                done.append(next(outcomes))
                bar.update(len(done[-1].ids))
            yield _Outcome(
                np.concatenate([np.zeros((0, len(Measured._fields)), np.int32), *(o.rows for o in done)]),
                [identity for o in done for identity in o.ids],
                np.concatenate([np.zeros((0, 2), np.uint64), *(o.hashes for o in done)]),
                [images for o in done for images in o.images],
                [problem for o in done for problem in o.problems],
            )


@contextmanager
def _outcomes(
    sets: Sequence[RecordSet], tasks: Iterable[_Task], workers: int
) -> Iterator[Iterator[_Outcome]]:
    """Give what becomes of the tasks, in order, found by this process or by several."""
    if workers <= 1:
        yield (_examine_here(sets, task) for task in tasks)
        return
    # A forked process could inherit a lock that a thread of the tokenizer or of torch holds.
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_begin_worker, initargs=(sets,)
    )
    try:
        yield pool.map(_examine_in_worker, tasks)
    except BrokenProcessPool as error:
        raise DataError(
            "a process that checked the records ended early; perhaps the machine is short of memory"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def available_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _examine_here(sets: Sequence[RecordSet], task: _Task) -> _Outcome:
    """Look at records one after the other; one that cannot be used gets zeros."""
    records = sets[task.set_number]
    rows = np.zeros((len(task.indices), len(Measured._fields)), np.int32)
    hashes = np.zeros((len(task.indices), 2), np.uint64)
    ids: list[str | None] = []
    images: list[tuple[ShownImage, ...]] = []
    problems: list[Problem] = []
    for row, pair, index in zip(rows, hashes, task.indices.tolist(), strict=True):
        try:
            examined = records.examine(index, decode=task.decode)
        except DataError as error:
            ids.append(error.record)
            images.append(())
            problems.append(_problem(records, index, error.record, error.kind, error.message))
            continue
        row[:] = examined.measured
        pair[:] = examined.name, examined.content
        ids.append(show_id(examined.id))
        images.append(examined.images)
        problems += [_problem(records, index, ids[-1], *oddity) for oddity in examined.find_warnings]
    return _Outcome(rows, ids, hashes, images, problems)


def _problem(records: RecordSet, index: int, identity: str | None, kind: str, message: str) -> Problem:
    spec = records.spec
    return Problem(spec.name, index, spec.annotation, records.file.line(index), identity, kind, message)


# Of a worker alone.
_sets: Sequence[RecordSet] = ()


def _begin_worker(sets: Sequence[RecordSet]) -> None:
    """Keep the sets; the processes are what is parallel, not the tokenizer."""
    global _sets
    _sets = sets
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _examine_in_worker(task: _Task) -> _Outcome:
    return _examine_here(_sets, task)
