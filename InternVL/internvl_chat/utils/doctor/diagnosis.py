"""The result of the inspections: facts about a machine, and its problems."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    """A problem of a machine.

    Attributes:
        severity: `error` prevents training, `warning` does not.
    """

    what: str
    advice: str
    severity: str = "warning"


@dataclass
class Diagnosis:
    """Facts about a machine by subject, and its problems."""

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def run(self, name: str, inspect: Callable[["Diagnosis"], Any]) -> None:
        """Store the facts of an inspection; an exception becomes a warning.

        Args:
            name: subject of the inspection.
            inspect: adds problems to this diagnosis and returns facts.
        """
        try:
            self.facts[name] = inspect(self)
        except Exception as error:
            self.facts[name] = None
            self.warn(f"{name} could not be inspected: {type(error).__name__}: {error}", "see the error")

    def warn(self, what: str, advice: str) -> None:
        """Add a problem that does not prevent training."""
        self.problems.append(Problem(what, advice))

    def fail(self, what: str, advice: str) -> None:
        """Add a problem that prevents training."""
        self.problems.append(Problem(what, advice, "error"))

    @property
    def ready(self) -> bool:
        """Whether training can start."""
        return all(problem.severity != "error" for problem in self.problems)
