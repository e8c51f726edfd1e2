"""Records that are there twice: the same id within a data set, or the same content in any two places."""

from collections.abc import Iterator, Sequence

import numpy as np

from internvl_chat.data.index.cache import RecordIndex
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.problems import Problem


def find_duplicates(sets: Sequence[RecordSet], indexes: Sequence[RecordIndex]) -> Iterator[Problem]:
    """Yield a warning for each record that repeats an earlier one, in the order of the files.

    Content is the same where conversation and image paths are; images that are copies under other names are
    not compared.

    Args:
        sets: the data sets.
        indexes: of `index_records(sets)`.
    """
    bounds = np.cumsum([0, *map(len, indexes)])
    contents = np.concatenate([np.zeros(0, np.uint64), *(index.contents for index in indexes)])
    later, first = _repeated(contents)
    where = np.searchsorted(bounds, first, side="right") - 1
    for number, (records, index) in enumerate(zip(sets, indexes, strict=True)):
        for i, j in zip(*_repeated(index.names), strict=True):
            yield _warning(records, index, i, "duplicate id", f"the same id as line {records.file.line(j)}")
        begin, end = np.searchsorted(later, bounds[number : number + 2])
        for i, j, other in zip(later[begin:end], first[begin:end], where[begin:end], strict=True):
            line = sets[other].file.line(j - bounds[other])
            place = f"line {line}" if other == number else f"line {line} of data set {sets[other].spec.name}"
            message = f"the same conversation and images as {place}"
            yield _warning(records, index, i - bounds[number], "duplicate record", message)


def _repeated(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of values that have come before, and where each came first; 0 is no value.

    >>> [places.tolist() for places in _repeated(np.array([5, 0, 7, 5, 0, 5], np.uint64))]
    [[3, 5], [0, 0]]
    """
    known = np.flatnonzero(hashes)
    _, first, inverse = np.unique(hashes[known], return_index=True, return_inverse=True)
    later = np.flatnonzero(first[inverse] != np.arange(len(known)))
    return known[later], known[first[inverse[later]]]


def _warning(records: RecordSet, index: RecordIndex, place: int, kind: str, message: str) -> Problem:
    spec = records.spec
    return Problem(
        spec.name, int(place), spec.annotation, records.file.line(place), index.ids[place], kind, message
    )
