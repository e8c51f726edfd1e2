"""Steps that must not change the weights: those that teach nothing, or are no numbers."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence

from internvl_chat.utils.errors import TrainingError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# A gradient is called a spike if its norm is so many times the median of the latest steps'.
_SPIKE = 10.0
_LATEST = 100
_FEWEST = 20
_NAMED = 16

Records = Sequence[tuple[str, int]]


class StepGuard:
    """Judges each step before its gradients are used.

    Args:
        max_bad_steps: so many bad steps of one start of the program are left out; the next one ends the run.
    """

    def __init__(self, max_bad_steps: int) -> None:
        self.max_bad_steps = max_bad_steps
        self.bad_steps = 0
        self._norms: deque[float] = deque(maxlen=_LATEST)

    def judge(
        self, step: int, loss: float, norm: float, supervised: int, records: Callable[[], Records]
    ) -> str | None:
        """Return why a step must be left out, or None if its gradients may be used.

        Args:
            step: its number, from 1.
            loss: of the whole step.
            norm: of all its gradients.
            supervised: tokens that it teaches.
            records: names its records, as data set and index from 0.

        Raises:
            TrainingError: there were too many bad steps.
        """
        reason = _fault(loss, norm, supervised)
        if reason is None:
            self._look_for_spike(step, norm, records)
            return None
        self.bad_steps += 1
        told = f"step {step}: {reason}; its records (data set and index from 0): {name_records(records())}"
        if self.bad_steps > self.max_bad_steps:
            raise TrainingError(
                f"{told}. Nothing of this step was kept. That makes {self.bad_steps} bad steps, and "
                f"--max_bad_steps is {self.max_bad_steps}"
            )
        logger.warning("%s. The step is left out (%d of %d)", told, self.bad_steps, self.max_bad_steps)
        return reason

    def _look_for_spike(self, step: int, norm: float, records: Callable[[], Records]) -> None:
        if len(self._norms) >= _FEWEST:
            usual = statistics.median(self._norms)
            if norm > _SPIKE * usual:
                logger.warning(
                    "step %d: the gradient's norm is %.3g, and %.3g in the median of the last %d steps; its "
                    "records (data set and index from 0): %s",
                    step, norm, usual, len(self._norms), name_records(records()),
                )  # fmt: skip
        self._norms.append(norm)


def _fault(loss: float, norm: float, supervised: int) -> str | None:
    if not supervised:
        return "nothing in it is supervised"
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(norm):
        return f"the gradient's norm is {norm}"
    return None


def name_records(records: Records) -> str:
    """Return the first records as text, and how many more there are."""
    named = ", ".join(f"{name} {index}" for name, index in records[:_NAMED])
    more = len(records) - _NAMED
    return f"{named} and {more} more" if more > 0 else named
