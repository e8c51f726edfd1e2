"""Result of the inspections: facts about the host and the problems found."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    """Problem found by an inspection.

    Attributes:
        what: description of the problem.
        advice: how to fix it.
        severity: `error` if the problem prevents training, otherwise `warning`.
    """

    what: str
    advice: str
    severity: str = "warning"


@dataclass
class Diagnosis:
    """Facts about the host, keyed by subject, and the problems found."""

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def run(self, name: str, inspect: Callable[["Diagnosis"], Any]) -> None:
        """Run an inspection and store its facts; an exception becomes a warning.

        Args:
            name: subject of the inspection.
            inspect: function that adds any problems to this diagnosis and returns the facts.
        """
        try:
            self.facts[name] = inspect(self)
        except Exception as error:
            self.facts[name] = None
            self.warn(f"{name} could not be inspected", f"{type(error).__name__}: {error}")

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
