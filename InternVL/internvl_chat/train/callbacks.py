"""What the Trainer's loop calls when an epoch, a step or the training begins or ends."""

import weakref
from typing import Any, Protocol

from transformers import TrainerCallback

from internvl_chat.data.order import StepSampler


class Rehearsing(Protocol):
    """A trainer that has something to do before its first step."""

    def rehearse(self) -> None:
        """Run the largest pack once."""

    def start_clock(self) -> None:
        """Let the first step begin now."""


class Stoppable(Protocol):
    """A trainer that may be asked to stop.

    Attributes:
        stops: True once all processes know that the run is to stop.
    """

    stops: bool


class SetEpoch(TrainerCallback):
    """Tells the sampler which epoch begins."""

    def __init__(self, sampler: StepSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the Trainer before it iterates the loader."""
        self.sampler.set_epoch(int(state.epoch or 0))


class Rehearse(TrainerCallback):
    """Rehearses the largest pack when model and optimizer are in place."""

    def __init__(self, trainer: Rehearsing) -> None:
        # A circle would keep the loader's processes alive beyond the run.
        self.trainer = weakref.proxy(trainer)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Called by the Trainer before the first step."""
        self.trainer.rehearse()
        self.trainer.start_clock()


class StopWhenAsked(TrainerCallback):
    """Saves and ends the run after a step before which some process was asked to stop."""

    def __init__(self, trainer: Stoppable) -> None:
        self.trainer = weakref.proxy(trainer)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the Trainer when the weights are updated; the time to validate may not be given."""
        if self.trainer.stops:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the Trainer after the last step of an epoch."""
        if self.trainer.stops:
            control.should_evaluate = False
