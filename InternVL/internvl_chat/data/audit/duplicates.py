"""Duplicate records: the same id within a dataset, or the same content within or across datasets."""

from collections.abc import Iterator, Sequence

import numpy as np

from internvl_chat.data.index.cache import RecordIndex
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.problems import Problem


def find_duplicates(sets: Sequence[RecordSet], indexes: Sequence[RecordIndex]) -> Iterator[Problem]:
    """Yield a warning for each record that repeats the id or the content of an earlier one.

    Records have the same content if their conversations and image paths match; image files are not compared.

    Args:
        sets: datasets to compare.
        indexes: result of `index_records(sets)`.
    """
    bounds = np.cumsum([0, *map(len, indexes)])
    contents = np.concatenate([np.zeros(0, np.uint64), *(index.content_hashes for index in indexes)])
    later, first = _repeated(contents)
    first_set = np.searchsorted(bounds, first, side="right") - 1
    for number, (records, index) in enumerate(zip(sets, indexes, strict=True)):
        for i, j in zip(*_repeated(index.id_hashes), strict=True):
            yield record_warning(records, index, i, "duplicate id", f"same id as line {records.file.line(j)}")
        begin, end = np.searchsorted(later, bounds[number : number + 2])
        for i, j, other in zip(later[begin:end], first[begin:end], first_set[begin:end], strict=True):
            line = sets[other].file.line(j - bounds[other])
            source = f" of dataset {sets[other].spec.name}" if other != number else ""
            message = f"same conversation and images as line {line}{source}"
            yield record_warning(records, index, i - bounds[number], "duplicate record", message)


def _repeated(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of repeated values and of their first occurrences; zeros are ignored.

    >>> [positions.tolist() for positions in _repeated(np.array([5, 0, 7, 5, 0, 5], np.uint64))]
    [[3, 5], [0, 0]]
    """
    known = np.flatnonzero(hashes)
    _, first, inverse = np.unique(hashes[known], return_index=True, return_inverse=True)
    later = np.flatnonzero(first[inverse] != np.arange(len(known)))
    return known[later], known[first[inverse[later]]]


def record_warning(records: RecordSet, index: RecordIndex, i: int, kind: str, message: str) -> Problem:
    """Return a warning about the record with index `i`."""
    spec = records.spec
    return Problem(spec.name, int(i), spec.annotation, records.file.line(i), index.ids[i], kind, message)
