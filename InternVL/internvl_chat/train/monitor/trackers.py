"""Reports to W&B and the like, which may fail without ending the run."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler

from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

_MOST_FAILURES = 3
_EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


class ShieldedCallback(TrainerCallback):
    """Passes events on; what fails is logged, and after three failures nothing more is passed on.

    Args:
        callback: of a reporting service.
    """

    def __init__(self, callback: TrainerCallback) -> None:
        self.callback, self.failures = callback, 0

    def handle(self, event: str, *args: Any, **kwargs: Any) -> Any:
        """Pass one event on."""
        if self.failures >= _MOST_FAILURES:
            return None
        try:
            return getattr(self.callback, event)(*args, **kwargs)
        except Exception as error:
            self.failures += 1
            name = type(self.callback).__name__
            more = "; it gets no more reports" if self.failures == _MOST_FAILURES else ""
            logger.warning("%s failed (%s: %s); training goes on%s", name, type(error).__name__, error, more)
            return None


def _passing_on(event: str) -> Callable[..., Any]:
    def pass_on(self: ShieldedCallback, *args: Any, **kwargs: Any) -> Any:
        return self.handle(event, *args, **kwargs)

    pass_on.__name__ = event
    return pass_on


for _event in _EVENTS:
    setattr(ShieldedCallback, _event, _passing_on(_event))


def shield_reports(handler: CallbackHandler) -> None:
    """Put a shield around each callback of a reporting service."""
    services = tuple(INTEGRATION_TO_CALLBACK.values())
    handler.callbacks = [
        ShieldedCallback(one) if isinstance(one, services) else one for one in handler.callbacks
    ]
