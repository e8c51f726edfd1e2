"""The audit of data sets: what can be used, how long it is, and everything that is wrong, by name."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from internvl_chat.data.audit.duplicates import find_duplicates
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.index.build import index_records
from internvl_chat.data.index.cache import Lengths, RecordIndex
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.data.sources.problems import Problem
from internvl_chat.utils.errors import DataError


@dataclass(frozen=True, eq=False)
class SetAudit:
    """What was found in one data set.

    Attributes:
        spec: its entry in the meta file.
        records: in the file; 0 where it cannot be read.
        used: records that are used, each counted once.
        lengths: of the usable ones among them.
        problems: errors and warnings.
    """

    spec: DatasetSpec
    records: int
    used: int
    lengths: Lengths
    problems: list[Problem]

    @property
    def usable(self) -> int:
        """Records that are used and can be."""
        return len(self.lengths)

    @property
    def kinds(self) -> Counter[str]:
        """How many problems there are of each kind."""
        return Counter(problem.kind for problem in self.problems)


@dataclass(frozen=True, eq=False)
class Audit:
    """What was found in all data sets.

    Attributes:
        sets: in the order of the meta file.
        opened: those that can be read as records at all.
        decoded: whether the images were decoded, not only opened.
        max_seq_length: that records were held against; None where tokens were not counted.
    """

    sets: list[SetAudit]
    opened: list[RecordSet]
    decoded: bool
    max_seq_length: int | None

    @property
    def problems(self) -> list[Problem]:
        """Those of all sets."""
        return [problem for one in self.sets for problem in one.problems]


def audit(
    specs: Sequence[DatasetSpec],
    encoder: RecordEncoder,
    *,
    decode: bool = False,
    workers: int | None = None,
    cache: Path | None = None,
) -> Audit:
    """Check every record that is used.

    Args:
        specs: the data sets.
        encoder: with which records would be encoded; a `TileCounter` counts no tokens.
        decode: also decode every image; else only their headers are read.
        workers: of `index_records`.
        cache: of `index_records`.
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
    for warning in find_warnings(sets, indexes):
        problems[warning.dataset].append(warning)
    known = dict(zip(opened, indexes, strict=True))
    audits = []
    for spec in specs:
        records, used, lengths = 0, 0, Lengths(*np.zeros((3, 0), np.int32))
        if spec.name in opened:
            index = known[spec.name]
            records, used, lengths = len(opened[spec.name]), len(index), _usable_lengths(index)
        audits.append(SetAudit(spec, records, used, lengths, problems[spec.name]))
    counts_tokens = encoder.tokenizer is not None
    return Audit(audits, sets, decode, encoder.preprocessing.max_seq_length if counts_tokens else None)


def find_warnings(sets: Sequence[RecordSet], indexes: Sequence[RecordIndex]) -> Iterator[Problem]:
    """Yield what is to be said of records that can be used, beyond what their index holds.

    Args:
        sets: the data sets.
        indexes: of `index_records(sets)`.
    """
    for records, index in zip(sets, indexes, strict=True):
        spec, lengths = records.spec, index.lengths
        if spec.length is not None and spec.length != len(records):
            message = f"'length' is {spec.length} in the meta file, but there are {len(records)} records"
            yield Problem(spec.name, None, spec.annotation, None, None, "length", message)
        for i in np.flatnonzero(lengths.tiles_lost | lengths.tokens_cut):
            tiles, lost, cut = lengths.tiles[i], lengths.tiles_lost[i], lengths.tokens_cut[i]
            found = []
            if lost:
                found.append(("fewer tiles", f"{tiles} tiles instead of {tiles + lost}"))
            if cut:
                found.append(("text cut", f"the last {cut} tokens are cut off"))
            for kind, message in found:
                yield Problem(
                    spec.name, int(i), spec.annotation, records.file.line(i), index.ids[i], kind, message
                )
    yield from find_duplicates(sets, indexes)


def _usable_lengths(index: RecordIndex) -> Lengths:
    usable = np.setdiff1d(np.arange(len(index)), index.unusable)
    return Lengths(**{name: column[usable] for name, column in index.lengths.columns.items()})
