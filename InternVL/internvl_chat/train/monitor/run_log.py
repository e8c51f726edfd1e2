"""What a run writes of each step: a line of figures, and a line that proves which records were used."""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internvl_chat.train.checkpoint.run_folder import LEDGER, METRICS
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)


class StepLog:
    """Appends to `metrics.jsonl` and `ledger.jsonl`; lines that a full disk refuses are kept for later.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._files = {METRICS: AppendedFile(folder / METRICS), LEDGER: AppendedFile(folder / LEDGER)}

    def write(self, figures: dict[str, Any], used: dict[str, Any]) -> None:
        """Add a step's line to both files."""
        self._files[METRICS].append(figures)
        self._files[LEDGER].append(used)

    def write_left_out(self, records: Sequence[dict[str, Any]]) -> None:
        """Begin the ledger with the records that no step uses."""
        self._files[LEDGER].append({"step": 0, "skipped": list(records), "trained": []})

    def bring_to_disk(self) -> None:
        """Wait until the lines are on the disk, so that no checkpoint is without those before it."""
        for file in self._files.values():
            file.bring_to_disk()

    def skipped(self) -> list[tuple[str, int]]:
        """Return the records that earlier steps skipped, as data set and index."""
        file = self._files[LEDGER].path
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        rows = [json.loads(line) for line in lines if '"skipped"' in line]
        return [(one["dataset"], one["index"]) for row in rows for one in row.get("skipped", ())]


class AppendedFile:
    """A file of JSON lines, each of which is in it whole or not yet.

    Args:
        path: of the file; it is made by the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []
        self._said = False

    def append(self, row: dict[str, Any]) -> None:
        """Add a line after those that wait; none is lost where that is impossible for now."""
        self._waiting.append(json.dumps(row, ensure_ascii=False) + "\n")
        size = None
        try:
            with self.path.open("ab") as stream:
                size = stream.tell()
                stream.write("".join(self._waiting).encode("utf-8"))
        except OSError as error:
            if size is not None:
                self._cut_to(size)
            if not self._said:
                self._said = True
                logger.warning(
                    "%s: cannot be written to (%s); its lines are kept until it can",
                    self.path,
                    error.strerror,
                )
            return
        self._waiting.clear()
        self._said = False

    def bring_to_disk(self) -> None:
        """Wait until the lines are on the disk; one that does not take them is told by `append`."""
        with contextlib.suppress(OSError), self.path.open("rb") as stream:
            os.fsync(stream.fileno())

    def _cut_to(self, size: int) -> None:
        """Take back what was written in part."""
        try:
            with self.path.open("r+b") as stream:
                stream.truncate(size)
        except OSError as error:
            logger.warning("%s: may hold part of a line (%s)", self.path, error.strerror)
