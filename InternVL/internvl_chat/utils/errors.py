"""The errors that a user can cause, each with the exit code of the command line.

Everything else that escapes is a defect of this program and keeps its traceback.
"""

from collections.abc import Sequence
from pathlib import Path


class M3LLMError(Exception):
    """A fault of the user's data, model or command line, told in one message."""

    exit_code = 1


class ModelError(M3LLMError):
    """A checkpoint is missing, incomplete or does not fit what was asked of it."""


class TrainingError(M3LLMError):
    """Training has gone wrong and must not go on."""


class DataError(M3LLMError):
    """A record or file cannot be used.

    Args:
        message: what is wrong and what to do about it.
        file: the annotation, meta or image file at fault.
        line: line in that file, counted from 1.
        record: the record's id, where it has one.
        kind: a short word for what is wrong (see `data.problems`).
    """

    def __init__(
        self,
        message: str,
        *,
        file: Path | str | None = None,
        line: int | None = None,
        record: str | None = None,
        kind: str = "file",
    ) -> None:
        self.message, self.file, self.line, self.record, self.kind = message, file, line, record, kind
        super().__init__(message)

    def __str__(self) -> str:
        place = f"{self.file}" if self.file is not None else ""
        if self.line is not None:
            place += f", line {self.line}"
        if self.record is not None:
            place += f" (record {self.record!r})"
        return f"{place}: {self.message}" if place else self.message

    def __reduce__(self) -> tuple:
        return _rebuild_data_error, (type(self), self.message, self.file, self.line, self.record, self.kind)


def _rebuild_data_error(cls: type, message: str, file: Path, line: int, record: str, kind: str) -> DataError:
    """Unpickle a `DataError` that crosses from a loader process."""
    return cls(message, file=file, line=line, record=record, kind=kind)


class UsageError(M3LLMError):
    """The command line asks for something impossible; lists every problem at once."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__(format_problems(self.problems))


def format_problems(problems: Sequence[str]) -> str:
    """Return one problem as it is, several as a numbered list."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems:\n" + "\n".join(f"  {i}. {p}" for i, p in enumerate(problems, 1))
