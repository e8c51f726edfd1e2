"""Signals that stop a run: recorded when they arrive, obeyed at the next step boundary.

SLURM sends SIGTERM or SIGUSR1 before it ends a job; Ctrl-C sends SIGINT.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# Set by the launcher for its workers.
LAUNCHER = "M3LLM_LAUNCHER"  # its process id
STOPPED_BY = "M3LLM_STOPPED_BY"  # file in which a worker writes the signal that it obeyed
STOPPING = "M3LLM_STOPPING"  # the signal that workers started from now on have missed; empty if none

# Linux's prctl option for the signal that a process gets when its parent ends.
_PR_SET_PDEATHSIG = 1

# Interrupts closer together count as one: a scheduler may signal both the launcher and the workers.
_SAME_SECONDS = 1.0


class StopRequest:
    """Records stop signals while the context lasts.

    The first one is kept in `signal`. A second SIGINT ends the process at once.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._interrupted_at: float | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._record) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, *_: object) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            self._interrupted_at = self._interrupted_at or now
            if now - self._interrupted_at >= _SAME_SECONDS:
                _print("interrupted twice: stopping at once, without a checkpoint")
                os._exit(exit_code(signal.SIGINT))  # an exception would wait for threads
        if self.signal is None:
            self.signal = signal.Signals(number)
            if os.environ.get("RANK", "0") == "0":
                _print(f"{self.signal.name}: stopping after this step, with a checkpoint")


def _print(text: str) -> None:
    """Write a line from a signal handler, where a logger may hold a lock."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def stop_with_launcher() -> None:
    """Make the end of the launcher, if there is one, count as SIGTERM (Linux only).

    Exits if the launcher has ended or has been asked to stop.
    """
    if stopping := os.environ.get(STOPPING):
        sys.exit(report_stop(signal.Signals[stopping]))
    launcher = os.environ.pop(LAUNCHER, None)
    if launcher and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != int(launcher):
            sys.exit(f"the launcher (process {launcher}) has ended; so does this worker")


def exit_code(stopped_by: signal.Signals) -> int:
    """Return the exit code of a run that a signal stopped, as shells count it."""
    return 128 + stopped_by


def report_stop(stopped_by: signal.Signals) -> int:
    """Report the signal that was obeyed to the launcher, if there is one; returns the exit code to use."""
    if STOPPED_BY not in os.environ:
        return exit_code(stopped_by)
    with contextlib.suppress(OSError):  # the file is gone if the launcher is
        Path(os.environ[STOPPED_BY]).write_text(stopped_by.name, encoding="utf-8")
    return 0  # torchrun would restart a worker that ends with anything else
