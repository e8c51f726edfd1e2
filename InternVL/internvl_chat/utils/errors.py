"""Errors that the user can fix, with their exit codes. Any other exception is a bug and shows a traceback."""

from collections.abc import Sequence
from pathlib import Path


class M3LLMError(Exception):
    """Problem with the user's data, model or command line, which is reported without a traceback."""

    exit_code = 1


class ModelError(M3LLMError):
    """A checkpoint is missing, incomplete or unsuitable for the operation."""


class TrainingError(M3LLMError):
    """Training cannot continue."""


class DataError(M3LLMError):
    """A record or file is unusable.

    Args:
        message: the problem and how to solve it.
        file: annotation, meta or image file with the problem.
        kind: category of the problem (see `data.sources.problems`).
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
        location = f"{self.file}" if self.file is not None else ""
        if self.line is not None:
            location += f", line {self.line}"
        if self.record is not None:
            location += f" (record {self.record!r})"
        return f"{location}: {self.message}" if location else self.message


class StorageError(M3LLMError):
    """Object storage is unavailable or denies access. Unlike with `DataError`, no record is at fault."""


class UsageError(M3LLMError):
    """The command line is invalid; the message lists all problems."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__(format_problems(self.problems))


def format_problems(problems: Sequence[str]) -> str:
    """Return a single problem unchanged, and multiple problems as a numbered list."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems:\n" + "\n".join(f"  {i}. {p}" for i, p in enumerate(problems, 1))
