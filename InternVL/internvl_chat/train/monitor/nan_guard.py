"""Skip steps with a non-finite loss or gradient, or without supervised tokens."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence

from internvl_chat.utils.errors import TrainingError
from internvl_chat.utils.logging import get_logger
from internvl_chat.utils.text import counted

logger = get_logger(__name__)

# A gradient norm above this multiple of the median of recent steps is a spike.
_SPIKE = 10.0
_WINDOW = 100
_MIN_STEPS = 20
_MAX_LISTED = 16

Records = Sequence[tuple[str, int]]


class NanGuard:
    """Checks the loss and the gradients of each step before they are used.

    Args:
        max_bad_steps: number of steps that may be skipped; one more ends the run. Resuming resets the count.
    """

    def __init__(self, max_bad_steps: int) -> None:
        self.max_bad_steps = max_bad_steps
        self.bad_steps = 0
        self._norms: deque[float] = deque(maxlen=_WINDOW)

    def check(
        self, step: int, loss: float, norm: float, supervised: int, records: Callable[[], Records]
    ) -> str | None:
        """Return the reason to skip a step, or None if its gradients can be used.

        Args:
            norm: gradient norm before clipping.
            supervised: number of supervised tokens in the step.
            records: function that returns the (dataset, index) of each record in the step.

        Raises:
            TrainingError: more than `max_bad_steps` steps have been skipped.
        """
        if not supervised:
            reason = "no supervised tokens"
        elif not math.isfinite(loss):
            reason = f"the loss is {loss}"
        elif not math.isfinite(norm):
            reason = f"the gradient norm is {norm}"
        else:
            self._report_spike(step, norm, records)
            return None
        self.bad_steps += 1
        message = f"step {step}: {reason}; records (dataset and index): {format_records(records())}"
        if self.bad_steps > self.max_bad_steps:
            raise TrainingError(
                f"{message}. The run has skipped {counted(self.bad_steps, 'step')}, more than "
                f"--max_bad_steps {self.max_bad_steps} allows"
            )
        logger.warning(
            "%s. Step skipped (%d skipped so far, %d allowed)", message, self.bad_steps, self.max_bad_steps
        )
        return reason

    def _report_spike(self, step: int, norm: float, records: Callable[[], Records]) -> None:
        median = statistics.median(self._norms) if len(self._norms) >= _MIN_STEPS else math.inf
        if norm > _SPIKE * median:
            logger.warning(
                "step %d: the gradient norm is %.3g, the median of the last %d steps is %.3g; records "
                "(dataset and index): %s", step, norm, len(self._norms), median, format_records(records()),
            )  # fmt: skip
        self._norms.append(norm)


def format_records(records: Records) -> str:
    """Format the names and indices of the first 16 records, and count the rest."""
    text = ", ".join(f"{name} {index}" for name, index in records[:_MAX_LISTED])
    more = len(records) - _MAX_LISTED
    return f"{text} and {more} more" if more > 0 else text
