"""Audit datasets: find the usable records, their lengths, and all problems."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from internvl_chat.data.audit.duplicates import find_duplicates, record_warning
from internvl_chat.data.encode.encoder import RecordEncoder, RecordLengths
from internvl_chat.data.index.build import index_records
from internvl_chat.data.index.cache import Lengths, RecordIndex
from internvl_chat.data.index.image_manifest import ImageManifest
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.data.sources.problems import Problem, describe_by_kind
from internvl_chat.data.sources.skip_policy import (
    ExcludedRecord,
    exclude_records,
    raise_problems,
)
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True, eq=False)
class SetAudit:
    """Findings in one dataset.

    Attributes:
        records: number of records in the file; 0 if the file could not be opened.
        used: number of distinct records that `repeat_time` selects.
        lengths: lengths of the used records that are usable.
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
        opened: datasets whose annotation file could be opened.
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
    """Check all records that would be used for training and return the findings.

    Args:
        specs: datasets to check.
        encoder: encoder of the records; without a tokenizer, tokens are not counted.
        decode: decode all images; otherwise only those whose file may be truncated.
        workers: see `index_records`.
        cache: see `index_records`.
    """
    sets, unreadable_files = open_readable_sets(specs, encoder)
    opened = {records.spec.name: records for records in sets}
    problems: dict[str, list[Problem]] = {spec.name: [] for spec in specs}
    for problem in unreadable_files:
        problems[problem.dataset].append(problem)
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


def open_readable_sets(
    specs: Sequence[DatasetSpec], encoder: RecordEncoder
) -> tuple[list[RecordSet], list[Problem]]:
    """Open the datasets whose files can be read; return them, and a problem for each of the others."""
    opened, problems = [], []
    for spec in specs:
        try:
            opened.append(RecordSet(spec, encoder))
        except DataError as error:
            location = (spec.name, None, spec.annotation, error.line, None)
            message = error.message if error.file == spec.annotation else str(error)
            problems.append(Problem(*location, error.kind, message))
    return opened, problems


def check_before_training(
    sets: Sequence[RecordSet], *, check: str, on_bad_record: str, max_bad_fraction: float
) -> tuple[list[Lengths], list[ExcludedRecord], list[ImageManifest]]:
    """Index the records of a training run, and log what the data check found.

    Args:
        sets: datasets of the run.
        check: `full` decodes all images; `fast` decodes only those whose file may be truncated; `off` is like
            `fast`, but logs no findings.
        on_bad_record: `fail` to raise an error, `skip` to exclude unusable records.
        max_bad_fraction: maximum fraction of records that may be excluded.

    Returns:
        Lengths of the records of each dataset, the excluded records, and the image files of each dataset.

    Raises:
        DataError: with `fail`, a record is unusable; with `skip`, too many records are.
    """
    indexes = index_records(sets, decode=check == "full")
    problems = [problem for index in indexes for problem in index.problems]
    excluded: list[ExcludedRecord] = []
    if on_bad_record == "skip":
        excluded = exclude_records(problems, sum(map(len, indexes)), max_bad_fraction)
    else:
        try:
            raise_problems(problems)
        except DataError as error:
            raise DataError(
                f"{error}\nFix or remove these records, or exclude them with --on_bad_record skip"
            ) from None
    if check != "off":
        warnings = [problem for problem in problems if not problem.is_error]
        # RecordSet has already logged a wrong 'length'.
        warnings += [warning for warning in dataset_warnings(sets, indexes) if warning.kind != "length"]
        counts = Counter(warning.kind for warning in warnings)
        logger.info(
            "data check (%s): %d records, %d unusable%s",
            check, sum(map(len, indexes)), len(excluded),
            "".join(f", {kind}: {count}" for kind, count in counts.items()),
        )  # fmt: skip
        if warnings:
            lines = describe_by_kind(warnings)
            logger.warning("the data check found\n%s", "\n".join(f"  {line}" for line in lines))
    return [index.lengths for index in indexes], excluded, [index.images for index in indexes]


def dataset_warnings(sets: Sequence[RecordSet], indexes: Sequence[RecordIndex]) -> Iterator[Problem]:
    """Yield warnings about wrong `length`, unused datasets, removed tiles, truncated text and duplicates.

    Args:
        sets: datasets to check.
        indexes: result of `index_records(sets)`.
    """
    for records, index in zip(sets, indexes, strict=True):
        spec, lengths = records.spec, index.lengths
        if spec.length is not None and spec.length != len(records):
            message = f"'length' is {spec.length} in the meta file, but there are {len(records)} records"
            yield Problem(spec.name, None, spec.annotation, None, None, "length", message)
        if not len(index):
            message = f"'repeat_time' {spec.repeat_time:g} selects none of the {len(records)} records"
            yield Problem(spec.name, None, spec.annotation, None, None, "no records", message)
        for i in np.flatnonzero(lengths.tiles_lost | lengths.tokens_truncated).tolist():
            for kind, message in length_warnings(lengths[i]):
                yield record_warning(records, index, i, kind, message)
    yield from find_duplicates(sets, indexes)


def length_warnings(lengths: RecordLengths) -> Iterator[tuple[str, str]]:
    """Yield (kind, message) for the tiles and tokens that were removed to fit `max_seq_length`."""
    if lengths.tiles_lost:
        yield "fewer tiles", f"{lengths.tiles} tiles instead of {lengths.tiles + lengths.tiles_lost}"
    if lengths.tokens_truncated:
        yield "text truncated", f"the last {lengths.tokens_truncated} tokens are truncated"


def _usable_lengths(index: RecordIndex) -> Lengths:
    usable = np.setdiff1d(np.arange(len(index)), index.unusable)
    return index.lengths.select(usable)
