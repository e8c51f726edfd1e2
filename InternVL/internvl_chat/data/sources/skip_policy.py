"""What happens to records that cannot be used: the run ends, or they are left out by name.

Never is one replaced by another, and never a part of one left out: the order of the others does not change.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from internvl_chat.data.sources.problems import Problem
from internvl_chat.utils.errors import DataError

POLICIES = ("fail", "skip")

_LISTED = 20


class ExcludedRecord(NamedTuple):
    """A record that a run leaves out from its start: data set, index in the file from 0, where and why."""

    dataset: str
    index: int
    message: str


class Skipped(NamedTuple):
    """A record that was unusable when its step came: data set, index in the file from 0, id, and why."""

    dataset: str
    index: int
    id: str | None
    message: str


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise one error for all records that cannot be used, if there are any; it lists the first of them.

    Raises:
        DataError: of the one record, or of all.
    """
    errors = [problem for problem in problems if problem.is_error]
    if len(errors) == 1:
        [one] = errors
        raise DataError(one.message, file=one.file, line=one.line, record=one.id, kind=one.kind)
    if errors:
        raise DataError(
            "\n".join([f"{len(errors)} records cannot be used:", *list_problems(errors)]), kind=errors[0].kind
        )


def list_problems(problems: Sequence[Problem], most: int = _LISTED) -> list[str]:
    """Return a numbered line for each of the first problems, and how many more there are."""
    lines = [f"  {number}. {problem}" for number, problem in enumerate(problems[:most], 1)]
    return lines + [f"  ... and {len(problems) - most} more"] * (len(problems) > most)


def exclude_records(problems: Sequence[Problem], total: int, max_fraction: float) -> list[ExcludedRecord]:
    """Return the records to leave out: all that cannot be used.

    Args:
        problems: of all sets.
        total: records of all sets.
        max_fraction: most of them that may be left out.

    Raises:
        DataError: they are more; it lists the first of them and says what to do.
    """
    errors = [problem for problem in problems if problem.is_error]
    if len(errors) > max_fraction * total:
        raise DataError(
            "\n".join(
                [
                    f"{len(errors)} of {total} records cannot be used ({len(errors) / total:.2%}), more than "
                    f"--max_bad_fraction {max_fraction:g} allows:",
                    *list_problems(errors),
                    "repair them, or raise --max_bad_fraction if so many are to be left out",
                ]
            ),
            kind=errors[0].kind,
        )
    return [ExcludedRecord(problem.dataset, problem.index or 0, str(problem)) for problem in errors]


class SkipBudget:
    """Counts the records that turn out to be unusable in training, each once, until they are too many.

    Args:
        total: records of all sets, each once.
        max_fraction: most of them that may be left out, with those that are left out from the start.
        excluded: records that are left out from the start.
    """

    def __init__(self, total: int, max_fraction: float, excluded: Sequence[ExcludedRecord] = ()) -> None:
        self.total, self.max_fraction = total, max_fraction
        self._places = {(record.dataset, record.index) for record in excluded}

    def recall(self, places: Iterable[tuple[str, int]]) -> None:
        """Count the records (data set and index) that were skipped before a run was started again."""
        self._places.update((name, index) for name, index in places)

    def spend(self, skipped: Sequence[Skipped]) -> None:
        """Count records that were skipped.

        Raises:
            DataError: that makes too many.
        """
        self._places.update((record.dataset, record.index) for record in skipped)
        number = len(self._places)
        if skipped and number > self.max_fraction * self.total:
            raise DataError(
                f"{number} of {self.total} records are left out ({number / self.total:.2%}), more than "
                f"--max_bad_fraction {self.max_fraction:g} allows; the last: {skipped[-1].message}. "
                "Repair what the log names and start the same command again, or raise --max_bad_fraction if "
                "so many are to be left out"
            )
