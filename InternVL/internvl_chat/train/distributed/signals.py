"""Stop signals: recorded on arrival, handled after the current step.

SLURM sends SIGTERM to end a job; `sbatch --signal` requests an earlier signal, such as SIGUSR1. Ctrl-C sends
SIGINT.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# Environment variables that the launcher sets for its workers.
LAUNCHER = "M3LLM_LAUNCHER"  # process ID of the launcher
EXIT_CODE = "M3LLM_EXIT_CODE"  # file for the exit code of a run that must not be restarted
STOPPING = "M3LLM_STOPPING"  # stop signal that the launcher received before starting the worker, or empty

# Linux's prctl option for the signal sent to a process when its parent exits.
_PR_SET_PDEATHSIG = 1

# SIGINTs within this time count as one, because a scheduler may signal both the launcher and the workers.
_DEBOUNCE_SECONDS = 1.0


class StopRequest:
    """Context manager that records stop signals.

    `signal` is the first signal received. A second SIGINT ends the process immediately.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._interrupted_at: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

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
            if now - self._interrupted_at >= _DEBOUNCE_SECONDS:
                _print("interrupted twice: exiting immediately without a checkpoint")
                os._exit(exit_code(signal.SIGINT))  # an exception would wait for threads
        if self.signal is None:
            self.signal = signal.Signals(number)
            if os.environ.get("RANK", "0") == "0":
                _print(f"{self.signal.name}: saving a checkpoint after this step, then stopping")


def _print(text: str) -> None:
    """Write a line to stderr. Logging could deadlock, because the interrupted code may hold its lock."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def stop_with_launcher() -> None:
    """Let the kernel send SIGTERM to this worker when its launcher exits (Linux only).

    Exit immediately if the launcher has already exited or received a stop signal.
    """
    if stopping := os.environ.get(STOPPING):
        sys.exit(report_exit(exit_code(signal.Signals[stopping])))
    launcher = os.environ.pop(LAUNCHER, None)
    if launcher and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != int(launcher):
            sys.exit(f"the launcher (process {launcher}) has exited; stopping this worker")


def note_start() -> bool:
    """Record that this worker has started; return whether this is a restart of the run.

    torchrun restarts workers after a failure and when nodes join or leave; SLURM requeues jobs. torchrun does
    not count restarts when nodes join or leave, so each worker also writes a marker file to the launcher's
    temporary folder.
    """
    counts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    restarted = any(count.isdecimal() and int(count) > 0 for count in counts)
    if EXIT_CODE in os.environ:
        note = Path(os.environ[EXIT_CODE])
        marker = note.with_name(f"started-{os.environ.get('LOCAL_RANK', '0')}")
        restarted |= marker.exists()
        with contextlib.suppress(OSError):  # the disk is full, or the launcher has exited
            marker.touch()
            # When nodes join or leave, torchrun stops the workers with SIGTERM and starts new ones.
            note.unlink(missing_ok=True)
    return restarted


def exit_code(stopped_by: signal.Signals) -> int:
    """Return the exit code of a run stopped by a signal: 128 + signal number, as in shells."""
    return 128 + stopped_by


def report_exit(code: int) -> int:
    """Tell the launcher the exit code of a run that must not be restarted; return this worker's exit code."""
    if EXIT_CODE not in os.environ or not code:
        return code
    try:
        Path(os.environ[EXIT_CODE]).write_text(str(code), encoding="utf-8")
    except OSError:  # the disk is full, or the launcher has exited
        return code
    return 0  # torchrun restarts workers that exit with a nonzero code
