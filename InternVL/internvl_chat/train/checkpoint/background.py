"""Saving in a thread while training goes on; only the optimizer waits, until all is copied.

Weights and the optimizer's state change in the optimizer's step alone: during the forward and backward pass
before it they can be copied, and what is copied can be written during any number of steps.
"""

import contextlib
import threading
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import psutil
import torch
from torch import Tensor

from internvl_chat.train.checkpoint.snapshot import bytes_to_copy, copy_to_host
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

# Copies are made where so many times their size is available: training itself may need more, too.
_MEMORY_FACTOR = 1.2
# On a CPU, how much longer than it works the thread rests, so that no step takes much longer than others.
_REST = 4.0


class BackgroundSaver:
    """Copies tensors and writes them in a thread, one save at a time.

    An error of the thread is raised by the next call of any method. As a context it ends when the save under
    way does.

    Args:
        device: where the tensors are.
        in_background: False to write at once, without copies, while the caller waits.
    """

    def __init__(self, device: torch.device, *, in_background: bool = True) -> None:
        self.device, self.in_background = device, in_background
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._awaited = threading.Event()
        self._awaited.set()
        self._error: BaseException | None = None
        self._said_why = False

    def save(self, tensors: Any, write: Callable[[Any], None], fixed: Sequence[Tensor] = ()) -> None:
        """Copy and write; returns at once, unless an earlier save is under way or the memory is short.

        Args:
            tensors: what `copy_to_host` takes.
            write: is given the copies.
            fixed: those among the tensors that nobody changes, so that they need no copies.
        """
        self.wait()
        if not (self.in_background and self._has_room(bytes_to_copy(tensors, fixed))):
            write(tensors)
            return
        self._copied.clear()
        self._awaited.clear()
        arguments = (tensors, write, fixed, _now(self.device))
        # Not a daemon: a process that ends waits for it.
        self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint", daemon=False)
        self._thread.start()
        if self.device.type == "cpu":
            # Copying beside a step that keeps all cores busy takes longer than before it.
            self._copied.wait()

    def wait_until_copied(self) -> None:
        """Wait until the tensors may be changed again."""
        self._copied.wait()
        self._raise_error()

    def pause(self, seconds: float) -> None:
        """Rest the thread after so many seconds of work, if it took them from training and nobody waits."""
        if self.device.type == "cpu":
            self._awaited.wait(_REST * seconds)

    def wait(self) -> None:
        """Wait until the save under way, if any, is written."""
        self._awaited.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise_error()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception as failed:
            if error is None:
                raise
            logger.error("the last checkpoint was not written: %s", failed)

    def _run(
        self,
        tensors: Any,
        write: Callable[[Any], None],
        fixed: Sequence[Tensor],
        made: torch.cuda.Event | None,
    ) -> None:
        """Do the work of the thread."""
        try:
            with _beside_training(self.device, made):
                write(self._copy(tensors, fixed))
        except BaseException as error:
            # Or the copies would stay in memory for as long as the error does.
            traceback.clear_frames(error.__traceback__)
            self._error = error

    def _copy(self, tensors: Any, fixed: Sequence[Tensor]) -> Any:
        try:
            return copy_to_host(tensors, fixed)
        finally:
            self._copied.set()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _has_room(self, size: int) -> bool:
        """Say whether copies of that size fit into the host's memory; log it the first time they do not."""
        needed, available = _MEMORY_FACTOR * size, psutil.virtual_memory().available
        if needed > available and not self._said_why:
            self._said_why = True
            logger.warning(
                "training waits while checkpoints are written: going on meanwhile needs %.1f GB of memory, "
                "and %.1f GB are available",
                needed / 1e9,
                available / 1e9,
            )
        return needed <= available


def _now(device: torch.device) -> torch.cuda.Event | None:
    """Return the moment at which the GPU has done all that it was told so far; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_stream(device).record_event()


@contextlib.contextmanager
def _beside_training(device: torch.device, made: torch.cuda.Event | None) -> Any:
    """Run this thread's GPU work in a stream of its own, after the moment when the tensors were made."""
    with torch.no_grad():
        if made is None:
            yield
            return
        stream = torch.cuda.Stream(device)
        stream.wait_event(made)
        with torch.cuda.stream(stream):
            yield
