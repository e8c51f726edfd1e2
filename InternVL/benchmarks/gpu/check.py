"""What an item of the acceptance run is given, and where it leaves what it finds."""

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SIZES = ("small", "8b")


class Skipped(Exception):
    """An item does not apply to this machine; the message says why."""


@dataclass
class Check:
    """An item at work.

    Attributes:
        name: of the item.
        work: folder of all items, for data and runs.
        size: `small` or `8b`.
        device: `cpu` or `cuda`.
        figures: what was measured.
        summary: a line for the table.
        failures: what is wrong.
    """

    name: str
    work: Path
    size: str
    device: str
    figures: dict[str, Any] = field(default_factory=dict)
    summary: str = ""
    failures: list[str] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        """Whether the items run on a GPU."""
        return self.device == "cuda"

    @property
    def folder(self) -> Path:
        """The item's own folder, which is made."""
        folder = self.work / self.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def add(self, **figures: Any) -> None:
        """Keep figures, also if the item fails or is stopped later."""
        self.figures |= figures
        self._write("failed", "it was stopped")

    def expect(self, condition: bool, message: str) -> None:
        """Note a failure unless a condition holds; the item goes on."""
        if not condition:
            self.failures.append(message)

    def compare(self, name: str, error: float, tolerance: float) -> None:
        """Keep an error and its tolerance, and note a failure if it is larger (or NaN)."""
        self.add(**{name: {"error": error, "tolerance": tolerance}})
        self.expect(error <= tolerance, f"{name}: error {error:.3g}, tolerance {tolerance:.3g}")

    def result_of(self, name: str) -> dict[str, Any] | None:
        """Return what another item has found; None if it did not run."""
        return read_result(self.work, name)

    def run(self, item: Callable[["Check"], None]) -> None:
        """Run the item and write its status, reason, summary and figures."""
        self._write("failed", "it was stopped")
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
        result = {"status": status, "why": why, "summary": self.summary, "figures": self.figures}
        self.work.mkdir(parents=True, exist_ok=True)
        partial = self.work / f".{self.name}.json"
        partial.write_text(json.dumps(result, default=str), encoding="utf-8")
        partial.replace(self.work / f"{self.name}.json")


def read_result(work: Path, name: str) -> dict[str, Any] | None:
    """Return what an item has written into the folder of all items; None if it has not begun."""
    file = work / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
