"""Watchdog thread that reports the activity of a rank when it makes no progress for a long time."""

import faulthandler
import os
import sys
import threading
import time
from typing import Self


class Watchdog:
    """Prints this rank's activity and the stacks of all threads if `note` has not been called for `seconds`.

    The run continues: a hanging collective may still complete; otherwise, its own timeout ends the run.

    Args:
        seconds: maximum time between calls of `note`; 0 disables the watchdog.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._note = (time.monotonic(), "starting")
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def note(self, text: str) -> None:
        """Set the current activity (for example, "validating after step 10") and restart the timer."""
        self._note = (time.monotonic(), text)

    def __enter__(self) -> Self:
        if self.seconds > 0:
            self._ended.clear()
            self._note = (time.monotonic(), "starting")
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self) -> None:
        reported = 0.0
        while not self._ended.wait(min(1.0, self.seconds / 4)):
            since, text = self._note
            silence = time.monotonic() - max(since, reported)
            if silence >= self.seconds:
                reported = time.monotonic()
                _report(reported - since, text)


def _report(seconds: float, text: str) -> None:
    rank = os.environ.get("RANK", "0")
    sys.stderr.write(f"rank {rank}: no progress for {seconds:.0f} s while {text}. Stacks of all threads:\n")
    sys.stderr.flush()
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
