"""The files of a run: `metrics.jsonl`, `ledger.jsonl` (which records were trained) and `validation.jsonl`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internvl_chat.train.checkpoint.run_folder import LEDGER, METRICS, VALIDATION
from internvl_chat.utils.files import JsonLinesFile


class RunLog:
    """Appends to the files of a run; lines that a full disk refuses are written later.

    Args:
        folder: folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        names = METRICS, LEDGER, VALIDATION
        self._metrics, self._ledger, self._validation = (JsonLinesFile(folder / name) for name in names)

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
