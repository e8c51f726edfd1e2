"""Validate all records and compute their lengths before training, in parallel and cached across runs.

Each text is tokenized once, and each image header is read once. The lengths match those from
`RecordSet.load`, because both use the same tile plan.
"""

import dataclasses
import json
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from internvl_chat.data.encode.encoder import RecordLengths
from internvl_chat.data.index.cache import (
    Lengths,
    RecordIndex,
    cache_file,
    read_index,
    write_index,
)
from internvl_chat.data.index.image_manifest import ImageManifest
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.images import ImageFile
from internvl_chat.data.sources.problems import Problem, printable_id
from internvl_chat.data.storage.stores import ObjectStore
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.files import sha256
from internvl_chat.utils.hardware import cpu_cores
from internvl_chat.utils.paths import default_cache

_CHUNK = 256
# Starting a worker takes about 400 MB and as long as indexing several thousand records.
_RECORDS_PER_WORKER = 5000
_DECODED_RECORDS_PER_WORKER = 250
_MAX_WORKERS = 16
# Preprocessing options that do not affect lengths.
_PIXEL_OPTIONS = ("normalize_type", "pad2square")


class IndexPart(NamedTuple):
    """Indexed records of one dataset.

    Attributes:
        set_number: position of the dataset in the arguments of `index_records`.
        records: (N,) indices of the records in the file.
        lengths: (N, 5) int32, one row of `RecordLengths` per record; zeros for unusable records.
        ids: printable id of each record.
        problems: problems of these records.
    """

    set_number: int
    records: np.ndarray
    lengths: np.ndarray
    ids: Sequence[str | None]
    problems: Sequence[Problem]


def index_records(
    sets: Sequence[RecordSet],
    *,
    decode: bool = False,
    workers: int | None = None,
    cache: Path | None = None,
    on_part: Callable[[IndexPart], None] | None = None,
) -> list[RecordIndex]:
    """Validate the records of each dataset and return one index per dataset.

    An index contains each used record once, in file order.

    The cached index is used if the annotation file, root, tokenizer and preprocessing are unchanged. Records
    in it are checked again if they were unusable, or if an image file has changed or is missing.

    Args:
        sets: datasets to index.
        decode: decode all images; otherwise only those whose file may be truncated.
        workers: number of worker processes; by default one per core (at most 16), or none for few records.
        cache: cache folder; by default `default_cache()`.
        on_part: called with each part of an index as soon as it is complete. Cached records are passed
            first, and once more if they are checked again.
    """
    files = _cache_files(sets, cache or default_cache())
    for records in sets:
        if isinstance(records.root, ObjectStore):
            records.root.prepare(records.num_distinct)
    indexes: list[RecordIndex] = []
    tasks: list[_Task] = []
    for number, (file, records) in enumerate(zip(files, sets, strict=True)):
        cached = read_index(file, records.num_distinct)
        if cached is None or (decode and not cached.decoded):
            tasks.append(_Task(number, np.arange(records.num_distinct), decode))
            cached = _empty_index(records.num_distinct, decode)
        else:
            if on_part:
                rows = np.stack(list(cached.lengths.columns.values()), axis=1)
                on_part(IndexPart(number, np.arange(len(cached)), rows, cached.ids, cached.problems))
            outdated = np.union1d(cached.unusable, cached.images.changed_records(records.root))
            if len(outdated):
                tasks.append(_Task(number, outdated.astype(np.int64), cached.decoded))
        indexes.append(cached)
    for task, result in zip(tasks, _check(sets, tasks, workers, on_part), strict=True):
        cached, file = indexes[task.set_number], files[task.set_number]
        updated = _update(cached, task, result)
        if cached.lengths.file is None or not updated.equals(cached):
            written = write_index(file, updated)
            lengths = dataclasses.replace(updated.lengths, file=file if written else None)
            updated = dataclasses.replace(updated, lengths=lengths)
        indexes[task.set_number] = updated
    return indexes


def _empty_index(num_records: int, decode: bool) -> RecordIndex:
    hashes = np.zeros(num_records, np.uint64)
    lengths = Lengths(*np.zeros((len(RecordLengths._fields), num_records), np.int32))
    return RecordIndex(lengths, [None] * num_records, hashes, hashes, [], ImageManifest.empty(), decode)


def _cache_files(sets: Sequence[RecordSet], folder: Path) -> list[Path]:
    """Return each dataset's cache file, named after a hash of all inputs of the index except the images."""
    tokenizers = {id(s.encoder.tokenizer): s.encoder.tokenizer for s in sets}
    digests = {key: tokenizer_digest(tokenizer) for key, tokenizer in tokenizers.items()}
    files = []
    for records in sets:
        status, root = records.spec.annotation.stat(), records.spec.root
        options = dataclasses.asdict(records.encoder.preprocessing)
        key = {
            "dataset": records.spec.name,
            "annotation": str(records.spec.annotation.absolute()),
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "root": str(root.absolute() if isinstance(root, Path) else root),
            "records": records.num_distinct,
            "preprocessing": {name: v for name, v in options.items() if name not in _PIXEL_OPTIONS},
            "truncate_text": records.encoder.truncate_text,
            "tokenizer": digests[id(records.encoder.tokenizer)],
        }
        files.append(cache_file(folder, key))
    return files


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return a hash of everything that determines token ids: vocabulary, merges and special tokens."""
    if tokenizer is None:
        return "none"
    if tokenizer.is_fast:
        text = plain_backend(tokenizer).to_str()
    else:
        special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        text = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab(), special], sort_keys=True)
    return sha256(text.encode())


class _Task(NamedTuple):
    """Records of a dataset to check, and whether to decode all their images."""

    set_number: int
    indices: np.ndarray
    decode: bool


class _Result(NamedTuple):
    """Result of a task.

    Attributes:
        lengths: (N, 5) int32, one row of `RecordLengths` per record.
        ids: id of each record.
        hashes: (N, 2) uint64, id hash and content hash of each record.
        images: image files of each record.
        problems: problems of all records.
    """

    lengths: np.ndarray
    ids: list[str | None]
    hashes: np.ndarray
    images: list[tuple[ImageFile, ...]]
    problems: list[Problem]


def _update(cached: RecordIndex, task: _Task, result: _Result) -> RecordIndex:
    """Return a copy of the cached index, updated with the result of a task."""
    lengths = np.stack(list(cached.lengths.columns.values()))
    lengths[:, task.indices] = result.lengths.T
    columns = dict(zip(RecordLengths._fields, lengths, strict=True))
    hashes = np.stack([cached.id_hashes, cached.content_hashes])
    hashes[:, task.indices] = result.hashes.T
    ids, indices = list(cached.ids), task.indices.tolist()
    for index, record_id in zip(indices, result.ids, strict=True):
        ids[index] = record_id
    checked = set(indices)
    problems = [problem for problem in cached.problems if problem.index not in checked] + result.problems
    return RecordIndex(
        Lengths.from_columns(columns, cached.lengths.file),
        ids,
        hashes[0],
        hashes[1],
        sorted(problems, key=lambda problem: problem.index or 0),
        cached.images.update(task.indices, result.images),
        task.decode,
    )


def _check(
    sets: Sequence[RecordSet],
    tasks: Sequence[_Task],
    workers: int | None,
    on_part: Callable[[IndexPart], None] | None,
) -> Iterator[_Result]:
    """Yield the result of each task."""
    total = sum(len(task.indices) for task in tasks)
    if workers is None:
        decode = any(task.decode for task in tasks)
        records_per_worker = _DECODED_RECORDS_PER_WORKER if decode else _RECORDS_PER_WORKER
        workers = min(cpu_cores(), _MAX_WORKERS, total // records_per_worker)
    chunks = [
        [task._replace(indices=task.indices[i : i + _CHUNK]) for i in range(0, len(task.indices), _CHUNK)]
        for task in tasks
    ]
    bar = tqdm(
        total=total,
        desc="checking",
        unit="record",
        delay=2,
        file=sys.stderr,
        dynamic_ncols=True,
        disable=None,
    )
    with bar, _run(sets, [chunk for of_task in chunks for chunk in of_task], workers) as results:
        for of_task in chunks:
            done = [_empty_result(0)]
            for chunk in of_task:
                result = next(results)
                done.append(result)
                bar.update(len(result.ids))
                if on_part:
                    part = (chunk.indices, result.lengths, result.ids, result.problems)
                    on_part(IndexPart(chunk.set_number, *part))
            yield _Result(
                np.concatenate([result.lengths for result in done]),
                [record_id for result in done for record_id in result.ids],
                np.concatenate([result.hashes for result in done]),
                [images for result in done for images in result.images],
                [problem for result in done for problem in result.problems],
            )


@contextmanager
def _run(sets: Sequence[RecordSet], tasks: Iterable[_Task], workers: int) -> Iterator[Iterator[_Result]]:
    """Provide the results of the tasks in order, computed in this process or in worker processes."""
    if workers <= 1:
        yield (_check_records(sets, task) for task in tasks)
        return
    with tempfile.NamedTemporaryFile(prefix="m3llm-index-") as file:
        # As an argument, a large dataset would block until the worker has imported torch. Workers would then
        # start one after the other.
        pickle.dump(sets, file)
        file.flush()
        # A forked process could inherit a lock held by a thread of the tokenizer or of torch.
        pool = ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=_init_worker, initargs=(file.name,)
        )
        try:
            yield pool.map(_check_in_worker, tasks)
        except BrokenProcessPool as error:
            raise DataError("a data check worker died; the machine may be out of memory") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _empty_result(num_records: int) -> _Result:
    lengths = np.zeros((num_records, len(RecordLengths._fields)), np.int32)
    return _Result(lengths, [], np.zeros((num_records, 2), np.uint64), [], [])


def _check_records(sets: Sequence[RecordSet], task: _Task) -> _Result:
    """Check records one by one; unusable ones get zero lengths and hashes."""
    records, result = sets[task.set_number], _empty_result(len(task.indices))
    records.prefetch(task.indices.tolist())
    no_images: tuple[ImageFile, ...] = ()
    for row, index in enumerate(task.indices.tolist()):
        try:
            checked = records.check(index, decode=task.decode)
        except DataError as error:
            record_id, images = error.record, no_images
            problems = [(error.kind, error.message)]
        else:
            record_id, images, problems = printable_id(checked.id), checked.images, checked.warnings
            result.lengths[row] = checked.lengths
            result.hashes[row] = checked.id_hash, checked.content_hash
        result.ids.append(record_id)
        result.images.append(images)
        location = (records.spec.name, index, records.spec.annotation, records.file.line(index), record_id)
        result.problems.extend(Problem(*location, *problem) for problem in problems)
    return result


# Datasets that a worker process checks; set by `_init_worker`.
_sets: Sequence[RecordSet] = ()


def _init_worker(file: str) -> None:
    """Read the datasets from a file of the parent process, and disable the tokenizer's own threads."""
    global _sets
    _sets = pickle.loads(Path(file).read_bytes())
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _check_in_worker(task: _Task) -> _Result:
    return _check_records(_sets, task)
