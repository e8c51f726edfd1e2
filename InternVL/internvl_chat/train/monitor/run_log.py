"""Write `metrics.jsonl`, `ledger.jsonl` (the records of each step) and `validation.jsonl`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internvl_chat.train.checkpoint.run_folder import LEDGER, METRICS, VALIDATION
from internvl_chat.utils.files import JsonLinesFile


class RunLog:
    """Appends to the logs of a run; lines that do not fit on a full disk are written later.

    Args:
        folder: output folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        names = METRICS, LEDGER, VALIDATION
        self._metrics, self._ledger, self._validation = (JsonLinesFile(folder / name) for name in names)

    def write(self, metrics_row: dict[str, Any], ledger_row: dict[str, Any]) -> None:
        """Append the lines of a step to metrics and ledger."""
        self._metrics.append(metrics_row)
        self._ledger.append(ledger_row)

    def append_validation(self, row: dict[str, Any]) -> None:
        """Append a line to `validation.jsonl`."""
        self._validation.append(row)

    def write_excluded(self, records: Sequence[dict[str, Any]]) -> None:
        """Write the records excluded before training as the first line of the ledger."""
        self._ledger.append({"step": 0, "skipped": list(records), "trained": []})

    def flush(self) -> None:
        """Sync metrics and ledger to disk; call it before saving a checkpoint."""
        self._metrics.flush()
        self._ledger.flush()

    def skipped(self) -> list[tuple[str, int]]:
        """Return the records skipped by earlier steps, as dataset and index."""
        file = self._ledger.path
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        rows = [json.loads(line) for line in lines if '"skipped"' in line]
        return [(record["dataset"], record["index"]) for row in rows for record in row.get("skipped", ())]
