"""Audit of datasets: usable records, their lengths, and all problems."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from internvl_chat.data.audit.duplicates import find_duplicates, record_warning
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.index.build import index_records
from internvl_chat.data.index.cache import Lengths, RecordIndex
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.data.sources.problems import Problem
from internvl_chat.utils.errors import DataError


@dataclass(frozen=True, eq=False)
class SetAudit:
    """Findings in one dataset.

    Attributes:
        spec: its entry in the meta file.
        records: number of records in the file; 0 if it cannot be read.
        used: number of distinct records that `repeat_time` selects.
        lengths: lengths of the usable records among them.
        problems: errors and warnings.
    """

    spec: DatasetSpec
    records: int
    used: int
    lengths: Lengths
    problems: list[Problem]

    @property
    def usable(self) -> int:
        """Number of usable records."""
        return len(self.lengths)

    @property
    def kinds(self) -> Counter[str]:
        """Number of problems of each kind."""
        return Counter(problem.kind for problem in self.problems)


@dataclass(frozen=True, eq=False)
class Audit:
    """Findings in all datasets.

    Attributes:
        sets: findings of each dataset, in the order of the meta file.
        opened: datasets whose annotation file is readable.
        decoded: whether all images were decoded, not only opened.
        max_seq_length: limit that the records were checked against; None if tokens were not counted.
    """

    sets: list[SetAudit]
    opened: list[RecordSet]
    decoded: bool
    max_seq_length: int | None

    @property
    def problems(self) -> list[Problem]:
        """Problems of all datasets."""
        return [problem for findings in self.sets for problem in findings.problems]


def audit(
    specs: Sequence[DatasetSpec],
    encoder: RecordEncoder,
    *,
    decode: bool = False,
    workers: int | None = None,
    cache: Path | None = None,
) -> Audit:
    """Check all records that would be used for training.

    Args:
        specs: the datasets.
        encoder: encoder of the records; without a tokenizer, tokens are not counted.
        decode: decode every image completely, instead of reading its header and end.
        workers: see `index_records`.
        cache: see `index_records`.
    """
    opened: dict[str, RecordSet] = {}
    problems: dict[str, list[Problem]] = {spec.name: [] for spec in specs}
    for spec in specs:
        try:
            opened[spec.name] = RecordSet(spec, encoder)
        except DataError as error:
            problem = Problem(spec.name, None, spec.annotation, error.line, None, error.kind, error.message)
            problems[spec.name].append(problem)
    sets = list(opened.values())
    indexes = index_records(sets, decode=decode, workers=workers, cache=cache)
    for index in indexes:
        for problem in index.problems:
            problems[problem.dataset].append(problem)
    for warning in dataset_warnings(sets, indexes):
        problems[warning.dataset].append(warning)
    counts = {
        name: (len(records), len(index), _usable_lengths(index))
        for (name, records), index in zip(opened.items(), indexes, strict=True)
    }
    unreadable = (0, 0, Lengths(*np.zeros((3, 0), np.int32)))
    audits = [SetAudit(spec, *counts.get(spec.name, unreadable), problems[spec.name]) for spec in specs]
    counts_tokens = encoder.tokenizer is not None
    return Audit(audits, sets, decode, encoder.preprocessing.max_seq_length if counts_tokens else None)


def dataset_warnings(sets: Sequence[RecordSet], indexes: Sequence[RecordIndex]) -> Iterator[Problem]:
    """Yield warnings about usable records: wrong `length`, lost tiles, truncated text, duplicates.

    Args:
        sets: the datasets.
        indexes: result of `index_records(sets)`.
    """
    for records, index in zip(sets, indexes, strict=True):
        spec, lengths = records.spec, index.lengths
        if spec.length is not None and spec.length != len(records):
            message = f"'length' is {spec.length} in the meta file, but there are {len(records)} records"
            yield Problem(spec.name, None, spec.annotation, None, None, "length", message)
        for i in np.flatnonzero(lengths.tiles_lost | lengths.tokens_truncated):
            tiles, lost, cut = lengths.tiles[i], lengths.tiles_lost[i], lengths.tokens_truncated[i]
            warnings = []
            if lost:
                warnings.append(("fewer tiles", f"{tiles} tiles instead of {tiles + lost}"))
            if cut:
                warnings.append(("text truncated", f"the last {cut} tokens are truncated"))
            for kind, message in warnings:
                yield record_warning(records, index, i, kind, message)
    yield from find_duplicates(sets, indexes)


def _usable_lengths(index: RecordIndex) -> Lengths:
    usable = np.setdiff1d(np.arange(len(index)), index.unusable)
    return Lengths(**{name: column[usable] for name, column in index.lengths.columns.items()})
