"""Non-finite steps: a step with a NaN or infinite loss or gradient, or without labels, is skipped."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence

from internvl_chat.utils.errors import TrainingError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# A gradient norm this many times above the median of the last steps is a spike.
_SPIKE = 10.0
_WINDOW = 100
_MIN_STEPS = 20
_MAX_NAMED = 16

Records = Sequence[tuple[str, int]]


class NanGuard:
    """Checks each step before its gradients are used.

    Args:
        max_bad_steps: bad steps that are skipped since the program started; the next one ends the run.
    """

    def __init__(self, max_bad_steps: int) -> None:
        self.max_bad_steps = max_bad_steps
        self.bad_steps = 0
        self._norms: deque[float] = deque(maxlen=_WINDOW)

    def check(
        self, step: int, loss: float, norm: float, supervised: int, records: Callable[[], Records]
    ) -> str | None:
        """Return why a step must be skipped, or None if its gradients may be used.

        Args:
            step: number of the step, from 1.
            loss: loss of the step over all ranks.
            norm: norm of all gradients.
            supervised: supervised tokens of the step.
            records: returns the step's records, as data set and index from 0.

        Raises:
            TrainingError: too many bad steps.
        """
        reason = _reason(loss, norm, supervised)
        if reason is None:
            self._report_spike(step, norm, records)
            return None
        self.bad_steps += 1
        message = f"step {step}: {reason}; records (data set and index from 0): {name_records(records())}"
        if self.bad_steps > self.max_bad_steps:
            raise TrainingError(
                f"{message}. This step changed no weights. It is bad step number {self.bad_steps}, and "
                f"--max_bad_steps is {self.max_bad_steps}"
            )
        logger.warning("%s. The step is skipped (%d of %d)", message, self.bad_steps, self.max_bad_steps)
        return reason

    def _report_spike(self, step: int, norm: float, records: Callable[[], Records]) -> None:
        median = statistics.median(self._norms) if len(self._norms) >= _MIN_STEPS else math.inf
        if norm > _SPIKE * median:
            logger.warning(
                "step %d: the gradient norm is %.3g, the median of the last %d steps is %.3g; records (data "
                "set and index from 0): %s", step, norm, len(self._norms), median, name_records(records()),
            )  # fmt: skip
        self._norms.append(norm)


def _reason(loss: float, norm: float, supervised: int) -> str | None:
    if not supervised:
        return "no supervised tokens"
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(norm):
        return f"the gradient norm is {norm}"
    return None


def name_records(records: Records) -> str:
    """Return the first records as text, and how many more there are."""
    named = ", ".join(f"{name} {index}" for name, index in records[:_MAX_NAMED])
    more = len(records) - _MAX_NAMED
    return f"{named} and {more} more" if more > 0 else named
