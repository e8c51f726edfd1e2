"""How long every record of the data sets is, known exactly before training and without decoding an image.

Texts are tokenised and image headers read once, by several processes; later runs read the numbers from a
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

from internvl_chat.data.dataset import RecordSet
from internvl_chat.data.encoding import Measured
from internvl_chat.data.length_cache import Lengths, cache_file, default_cache, read_lengths, write_lengths
from internvl_chat.data.template import plain_backend
from internvl_chat.errors import DataError
from internvl_chat.logs import get_logger

logger = get_logger(__name__)

_CHUNK = 256
# Starting a process takes as long as measuring some thousands of records, and about 400 MB.
_RECORDS_PER_WORKER = 5000
_MOST_WORKERS = 16
_LISTED_PROBLEMS = 20


def index_lengths(
    sets: Sequence[RecordSet], *, workers: int | None = None, cache: Path | None = None
) -> list[Lengths]:
    """Return the lengths of all records that are used of each set, each record once, in the file's order.

    Args:
        sets: the data sets.
        workers: processes that measure; by default one a core, and none beside this one for few records.
        cache: folder of cached numbers; by default `default_cache()`.

    Raises:
        DataError: records cannot be used. It lists the first of them; the other sets are cached all the same.
    """
    files = _cache_files(sets, cache or default_cache())
    found = [read_lengths(file, s.num_distinct) for file, s in zip(files, sets, strict=True)]
    missing = [number for number, lengths in enumerate(found) if lengths is None]
    problems = _Problems()
    for number, lengths in zip(missing, _measure([sets[i] for i in missing], workers, problems), strict=True):
        if lengths is not None:
            kept = write_lengths(files[number], lengths)
            found[number] = dataclasses.replace(lengths, file=files[number] if kept else None)
    problems.raise_if_any()
    return [lengths for lengths in found if lengths is not None]


def _cache_files(sets: Sequence[RecordSet], folder: Path) -> list[Path]:
    """Return each set's cache file, named by everything that its numbers depend on but the images."""
    tokenizers = {id(s.encoder.tokenizer): s.encoder.tokenizer for s in sets}
    digests = {key: tokenizer_digest(tokenizer) for key, tokenizer in tokenizers.items()}
    files = []
    for records in sets:
        status = records.spec.annotation.stat()
        facts = {
            "annotation": str(records.spec.annotation.absolute()),
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "root": str(records.spec.root.absolute()),
            "records": records.num_distinct,
            "preprocessing": dataclasses.asdict(records.encoder.preprocessing),
            "tokenizer": digests[id(records.encoder.tokenizer)],
        }
        files.append(cache_file(folder, facts))
    return files


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of what decides the ids of a text: vocabulary, merges, special tokens."""
    if tokenizer.is_fast:
        text = plain_backend(tokenizer).to_str()
    else:
        special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        text = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab(), special], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class _Chunk(NamedTuple):
    """Neighbouring records of one set."""

    set_number: int
    start: int
    stop: int


class _Measurement(NamedTuple):
    """What became of a chunk: a row of `Measured` for each record, the first problems, how many in all."""

    rows: np.ndarray
    problems: list[DataError]
    num_problems: int


class _Problems:
    """Records that cannot be used: the first of them, and how many there are."""

    def __init__(self) -> None:
        self.first: list[DataError] = []
        self.count = 0

    def add(self, measurement: _Measurement) -> None:
        """Take in those of a chunk."""
        self.first += measurement.problems[: _LISTED_PROBLEMS - len(self.first)]
        self.count += measurement.num_problems

    def raise_if_any(self) -> None:
        """Raise one error for all."""
        if self.count == 1:
            raise self.first[0]
        if self.count:
            more = self.count - len(self.first)
            lines = [f"  {i}. {problem}" for i, problem in enumerate(self.first, 1)]
            lines += [f"  ... and {more} more"] if more else []
            raise DataError("\n".join([f"{self.count} records cannot be used:", *lines]))


def _measure(sets: Sequence[RecordSet], workers: int | None, problems: _Problems) -> Iterator[Lengths | None]:
    """Yield each set's lengths, None where it has problems."""
    total = sum(s.num_distinct for s in sets)
    if workers is None:
        workers = min(_available_cores(), _MOST_WORKERS, total // _RECORDS_PER_WORKER)
    chunks = [
        _Chunk(number, start, min(start + _CHUNK, s.num_distinct))
        for number, s in enumerate(sets)
        for start in range(0, s.num_distinct, _CHUNK)
    ]
    bar = tqdm(total=total, desc="measuring", unit="record", delay=2, file=sys.stderr, dynamic_ncols=True)
    with bar, _measurements(sets, chunks, workers) as measurements:
        for records in sets:
            table, before = np.empty((records.num_distinct, len(Measured._fields)), np.int32), problems.count
            for start in range(0, len(table), _CHUNK):
                measurement = next(measurements)
                table[start : start + _CHUNK] = measurement.rows
                problems.add(measurement)
                bar.update(len(measurement.rows))
            columns = dict(zip(Measured._fields, np.ascontiguousarray(table.T), strict=True))
            yield None if problems.count > before else Lengths(**columns)


@contextmanager
def _measurements(
    sets: Sequence[RecordSet], chunks: Iterable[_Chunk], workers: int
) -> Iterator[Iterator[_Measurement]]:
    """Give what becomes of the chunks, in order, measured by this process or by several."""
    if workers <= 1:
        yield (_measure_chunk(sets, chunk) for chunk in chunks)
        return
    # A forked process could inherit a lock that a thread of the tokenizer or of torch holds.
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_begin_worker, initargs=(sets,)
    )
    try:
        yield pool.map(_measure_in_worker, chunks)
    except BrokenProcessPool as error:
        raise DataError(
            "a process that measured the records ended early; perhaps the machine is short of memory"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _measure_chunk(sets: Sequence[RecordSet], chunk: _Chunk) -> _Measurement:
    """Measure records one after the other; one with a problem gets zeros."""
    records = sets[chunk.set_number]
    rows = np.zeros((chunk.stop - chunk.start, len(Measured._fields)), np.int32)
    problems: list[DataError] = []
    for row, index in zip(rows, range(chunk.start, chunk.stop), strict=True):
        try:
            row[:] = records.measure(index)
        except DataError as problem:
            problems.append(problem)
    return _Measurement(rows, problems[:_LISTED_PROBLEMS], len(problems))


# Of a worker alone.
_sets: Sequence[RecordSet] = ()


def _begin_worker(sets: Sequence[RecordSet]) -> None:
    """Keep the sets; the processes are what is parallel, not the tokenizer."""
    global _sets
    _sets = sets
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _measure_in_worker(chunk: _Chunk) -> _Measurement:
    return _measure_chunk(_sets, chunk)
