"""The files of a run: `metrics.jsonl`, `ledger.jsonl` (which records were trained) and `validation.jsonl`."""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internvl_chat.train.checkpoint.run_folder import LEDGER, METRICS, VALIDATION
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)


class RunLog:
    """Appends to the files of a run; lines that a full disk refuses are kept and written later.

    Args:
        folder: folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        names = METRICS, LEDGER, VALIDATION
        self._metrics, self._ledger, self._validation = (JsonlFile(folder / name) for name in names)

    def write(self, metrics_row: dict[str, Any], ledger_row: dict[str, Any]) -> None:
        """Append a step's lines to metrics and ledger."""
        self._metrics.append(metrics_row)
        self._ledger.append(ledger_row)

    def append_validation(self, row: dict[str, Any]) -> None:
        """Append the line of a validation."""
        self._validation.append(row)

    def write_excluded(self, records: Sequence[dict[str, Any]]) -> None:
        """Begin the ledger with the records that are excluded from the start."""
        self._ledger.append({"step": 0, "skipped": list(records), "trained": []})

    def flush(self) -> None:
        """Wait until metrics and ledger are on disk, so that a checkpoint never precedes its lines."""
        self._metrics.flush()
        self._ledger.flush()

    def skipped(self) -> list[tuple[str, int]]:
        """Return the records that earlier steps skipped, as data set and index."""
        file = self._ledger.path
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        rows = [json.loads(line) for line in lines if '"skipped"' in line]
        return [(one["dataset"], one["index"]) for row in rows for one in row.get("skipped", ())]


class JsonlFile:
    """A file of JSON lines to which whole lines are appended.

    Args:
        path: the file; the first line creates it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: list[str] = []
        self._warned = False

    def append(self, row: dict[str, Any]) -> None:
        """Append a line after those that are pending; if that fails it stays pending."""
        self._pending.append(json.dumps(row, ensure_ascii=False) + "\n")
        size = None
        try:
            with self.path.open("ab") as stream:
                size = stream.tell()
                stream.write("".join(self._pending).encode("utf-8"))
        except OSError as error:
            if size is not None:
                self._truncate(size)
            if not self._warned:
                self._warned = True
                message = "%s: cannot be written to (%s); its lines are kept until it can"
                logger.warning(message, self.path, error.strerror)
            return
        self._pending.clear()
        self._warned = False

    def flush(self) -> None:
        """Wait until the lines are on disk; `append` reports a disk that refuses them."""
        with contextlib.suppress(OSError), self.path.open("rb") as stream:
            os.fsync(stream.fileno())

    def _truncate(self, size: int) -> None:
        """Remove a line that was written in part."""
        try:
            with self.path.open("r+b") as stream:
                stream.truncate(size)
        except OSError as error:
            logger.warning("%s: may hold part of a line (%s)", self.path, error.strerror)
