"""Policies for unusable records: stop the run, or exclude them and keep the order of the others."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from internvl_chat.data.sources.problems import Problem
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.text import counted

POLICIES = ("fail", "skip")

_MAX_LISTED = 20


class ExcludedRecord(NamedTuple):
    """A record excluded before training: dataset, index in the file, and reason."""

    dataset: str
    index: int  # type: ignore[assignment]  # hides tuple.index
    message: str


class SkippedRecord(NamedTuple):
    """A record found unusable during training: dataset, index in the file, id, and reason."""

    dataset: str
    index: int  # type: ignore[assignment]  # hides tuple.index
    id: str | None
    message: str


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise an error if any record is unusable.

    Raises:
        DataError: a record is unusable; the message lists the first unusable records.
    """
    errors = [problem for problem in problems if problem.is_error]
    if len(errors) == 1:
        [error] = errors
        raise DataError(error.message, file=error.file, line=error.line, record=error.id, kind=error.kind)
    if errors:
        message = "\n".join([f"{counted(len(errors), 'record')} cannot be used:", *list_problems(errors)])
        raise DataError(message, kind=errors[0].kind)


def list_problems(problems: Sequence[Problem | str], limit: int = _MAX_LISTED) -> list[str]:
    """Return a numbered line for each of the first `limit` problems, and a line that counts the rest."""
    lines = [f"  {number}. {problem}" for number, problem in enumerate(problems[:limit], 1)]
    return lines + [f"  ... and {len(problems) - limit} more"] * (len(problems) > limit)


def exclude_records(problems: Sequence[Problem], total: int, max_fraction: float) -> list[ExcludedRecord]:
    """Return the unusable records, which the run excludes.

    Args:
        problems: problems in all datasets.
        total: number of records in all datasets.
        max_fraction: maximum fraction of records that may be excluded.

    Raises:
        DataError: too many records are unusable; the message lists the first of them.
    """
    errors = [problem for problem in problems if problem.is_error]
    if len(errors) > max_fraction * total:
        lines = [
            f"{len(errors)} of {total} records cannot be used ({len(errors) / total:.2%}), more than "
            f"--max_bad_fraction {max_fraction:g} allows:",
            *list_problems(errors),
            "fix them, or raise --max_bad_fraction",
        ]
        raise DataError("\n".join(lines), kind=errors[0].kind)
    return [ExcludedRecord(problem.dataset, problem.index or 0, str(problem)) for problem in errors]


class SkipBudget:
    """Limits the fraction of records that are excluded or skipped, counting each record once.

    Args:
        total: number of records in all datasets.
        max_fraction: maximum fraction of records that may be excluded or skipped.
        excluded: records excluded before training.
    """

    def __init__(self, total: int, max_fraction: float, excluded: Sequence[ExcludedRecord] = ()) -> None:
        self.total, self.max_fraction = total, max_fraction
        self._unused = {(record.dataset, record.index) for record in excluded}

    def restore(self, records: Iterable[tuple[str, int]]) -> None:
        """Count records (dataset, index) that were skipped before the run was resumed."""
        self._unused.update((dataset, index) for dataset, index in records)

    def add(self, skipped: Sequence[SkippedRecord]) -> None:
        """Count skipped records.

        Raises:
            DataError: the fraction of excluded and skipped records exceeds the limit.
        """
        self._unused.update((record.dataset, record.index) for record in skipped)
        count = len(self._unused)
        if skipped and count > self.max_fraction * self.total:
            raise DataError(
                f"{count} of {self.total} records are excluded or skipped ({count / self.total:.2%}), more "
                f"than --max_bad_fraction {self.max_fraction:g} allows; the last one: {skipped[-1].message}. "
                "Fix the records listed in the log and run the same command again, or raise "
                "--max_bad_fraction"
            )
