"""State and result of an item of the acceptance run; the item runs in a separate process."""

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SIZES = ("small", "8b")


class Skipped(Exception):
    """Raised by an item that does not apply to this machine; the message is the reason."""


@dataclass
class Check:
    """State of a running item.

    Attributes:
        name: name of the item.
        work: working folder that all items share.
        size: `small` or `8b`.
        device: `cpu` or `cuda`.
        metrics: measurements, stored as `figures` in the result file.
        summary: text for the result table.
        failures: a message for each failed expectation.
    """

    name: str
    work: Path
    size: str
    device: str
    metrics: dict[str, Any] = field(default_factory=dict)
    summary: str = ""
    failures: list[str] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        """Whether the item runs on a GPU."""
        return self.device == "cuda"

    @property
    def folder(self) -> Path:
        """Folder of the item, created on first use."""
        folder = self.work / self.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def add(self, **metrics: Any) -> None:
        """Add metrics and write them to disk, so that they are kept if the item is killed later."""
        self.metrics |= metrics
        self._write("failed", "killed")

    def expect(self, condition: bool, message: str) -> None:
        """Record a failure with this message if the condition is False; the item continues."""
        if not condition:
            self.failures.append(message)

    def compare(self, name: str, error: float, tolerance: float) -> None:
        """Add an error and its tolerance to the metrics; record a failure if the error is larger or NaN."""
        self.add(**{name: {"error": error, "tolerance": tolerance}})
        self.expect(error <= tolerance, f"{name}: error {error:.3g}, tolerance {tolerance:.3g}")

    def result_of(self, name: str) -> dict[str, Any] | None:
        """Return the result of another item, or None if it has not started."""
        return read_result(self.work, name)

    def run(self, item: Callable[["Check"], None]) -> None:
        """Run the item and write its status, reason, summary and metrics."""
        self._write("failed", "killed")
        try:
            item(self)
        except Skipped as skipped:
            if not self.failures:
                self._write("skipped", str(skipped))
                return
        except Exception as error:
            traceback.print_exc()
            self.failures.append(f"{type(error).__name__}: {error}")
        self._write("failed" if self.failures else "ok", "; ".join(self.failures))

    def _write(self, status: str, why: str) -> None:
        result = {"status": status, "why": why, "summary": self.summary, "figures": self.metrics}
        self.work.mkdir(parents=True, exist_ok=True)
        partial = self.work / f".{self.name}.json"
        partial.write_text(json.dumps(result, default=str), encoding="utf-8")
        partial.replace(self.work / f"{self.name}.json")


def read_result(work: Path, name: str) -> dict[str, Any] | None:
    """Return the result of an item, or None if it has not started."""
    file = work / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
