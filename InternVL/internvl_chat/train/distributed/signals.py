"""Signals that ask a run to stop: noted when they come, obeyed at the next step boundary.

SIGTERM and SIGUSR1 are what SLURM sends before it ends a job, SIGINT what Ctrl-C sends.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# File in which a process tells the launcher which signal it obeyed; set by the launcher.
STOPPED_BY = "M3LLM_STOPPED_BY"

# The launcher's process number; set by whatever starts processes that must not outlive it.
LAUNCHER = "M3LLM_LAUNCHER"

# Set by the launcher when it has passed a signal on: what it starts from then on has nothing to do.
STOPPING = "M3LLM_STOPPING"

# Of Linux's prctl: the signal that a process gets when its parent ends.
_PR_SET_PDEATHSIG = 1

# Signals that come closer together are one: a launcher passes on what a terminal also sends directly.
_SAME_SECONDS = 1.0


class StopRequest:
    """Takes the signals for as long as the context lasts.

    The first one is kept in `signal`. A second SIGINT, at least a second after the first, ends the process
    at once.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._interrupted_at: float | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_at is not None and now - self._interrupted_at >= _SAME_SECONDS:
                # Not an exception: that would wait for threads and other processes.
                os.write(sys.stderr.fileno(), b"interrupted twice: stopping at once, without a checkpoint\n")
                os._exit(exit_code(signal.SIGINT))
            self._interrupted_at = now if self._interrupted_at is None else self._interrupted_at
        if self.signal is None:
            self.signal = signal.Signals(number)
            if os.environ.get("RANK", "0") == "0":
                os.write(
                    sys.stderr.fileno(),
                    f"{self.signal.name}: stopping after this step, with a checkpoint\n".encode(),
                )


def stop_with_launcher() -> None:
    """Let the end of the launcher, if there is one, count as SIGTERM, and end if it has been asked to stop.

    A run that nobody sees would be stopped by nobody. Linux only; elsewhere nothing happens.
    """
    if STOPPING in os.environ:
        sys.exit(report_stop(signal.Signals[os.environ[STOPPING]]))
    launcher = os.environ.pop(LAUNCHER, None)
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != int(launcher):
        sys.exit(f"the launcher (process {launcher}) has ended, and so does what it has started")


def exit_code(stopped_by: signal.Signals) -> int:
    """Return the exit code of a run that a signal has stopped, as shells count it."""
    return 128 + stopped_by


def report_stop(stopped_by: signal.Signals) -> int:
    """Tell the launcher, if there is one, which signal was obeyed; returns this process's exit code.

    A launcher would take a process that ends with another code than 0 for one to start again.
    """
    file = os.environ.get(STOPPED_BY)
    if file is None:
        return exit_code(stopped_by)
    with contextlib.suppress(OSError):  # it went with the launcher
        Path(file).write_text(stopped_by.name, encoding="utf-8")
    return 0
