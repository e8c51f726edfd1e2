"""Progress of a run: step, epoch and best validation metric."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

STATE_FILE = "trainer_state.json"
# Fields that have a different name in `trainer_state.json`, as written by transformers.
_JSON_NAMES = {"step": "global_step", "best_step": "best_global_step", "total_flops": "total_flos"}


@dataclass
class TrainState:
    """Progress of the training loop, saved in every checkpoint.

    Attributes:
        step: number of optimizer steps completed.
        epoch: number of epochs completed.
        best_step: step with the best validation metric; None before the first validation.
        best_metric: best validation metric so far.
        evals_without_improvement: number of validations since the best one, for early stopping.
        total_flops: FLOPs so far, summed across ranks.
        skipped_steps: number of completed steps whose gradients were not applied.
    """

    step: int = 0
    epoch: float = 0.0
    best_step: int | None = None
    best_metric: float | None = None
    evals_without_improvement: int = 0
    total_flops: float = 0.0
    skipped_steps: int = 0

    def update_best(self, metric: float, greater_is_better: bool) -> bool:
        """Record the validation metric of the current step; return whether it is the best so far."""
        best = self.best_metric
        is_better = best is None or (metric > best if greater_is_better else metric < best)
        if is_better and math.isfinite(metric):
            self.best_metric, self.best_step, self.evals_without_improvement = metric, self.step, 0
            return True
        self.evals_without_improvement += 1
        return False

    def to_json(self) -> dict[str, Any]:
        """Return the fields, keyed by their names in `trainer_state.json`."""
        return {_JSON_NAMES.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainState":
        """Create the state from the result of `to_json`; ignore other keys."""
        values = {"skipped_steps": 0, **values}  # not stored by earlier versions
        return cls(**{f.name: values[_JSON_NAMES.get(f.name, f.name)] for f in fields(cls)})


def read_state_file(checkpoint: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's `trainer_state.json`."""
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
