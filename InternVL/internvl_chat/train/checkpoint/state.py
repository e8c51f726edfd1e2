"""Progress of a run: step, epoch and the best validation so far."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

STATE_FILE = "trainer_state.json"
# Fields that transformers names otherwise.
_JSON_NAMES = {"step": "global_step", "best_step": "best_global_step", "total_flops": "total_flos"}


@dataclass
class TrainState:
    """What the training loop carries from step to step.

    Attributes:
        step: optimizer steps done.
        epoch: the same in epochs.
        best_step: step of the best validation.
        best_metric: its metric.
        evals_without_improvement: validations since then, for early stopping.
        total_flops: floating-point operations so far, over all ranks.
    """

    step: int = 0
    epoch: float = 0.0
    best_step: int | None = None
    best_metric: float | None = None
    evals_without_improvement: int = 0
    total_flops: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the values under their names in `trainer_state.json`."""
        return {_JSON_NAMES.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainState":
        """Rebuild the state from what `to_json` returned; anything else is ignored."""
        return cls(**{f.name: values[_JSON_NAMES.get(f.name, f.name)] for f in fields(cls)})


def read_state_file(checkpoint: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's `trainer_state.json`."""
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
