"""A thread that says what a process is doing when no step has ended for a long time."""

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType
from typing import Self


class Watchdog:
    """Prints this process's step, records and stacks whenever nothing was noted for `seconds`.

    It ends nothing: what waits may yet go on, and torch's own timeouts end what does not.

    Args:
        seconds: without news; 0 switches it off.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._news = (time.monotonic(), "starting")
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def note(self, doing: str) -> None:
        """Say what the process begins to do; the time counts from now."""
        self._news = (time.monotonic(), doing)

    def __enter__(self) -> Self:
        if self.seconds > 0:
            self._ended.clear()
            self._news = (time.monotonic(), "starting")
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self) -> None:
        said = 0.0
        while not self._ended.wait(min(1.0, self.seconds / 4)):
            since, doing = self._news
            silent = time.monotonic() - max(since, said)
            if silent >= self.seconds:
                said = time.monotonic()
                _report(said - since, doing)


def _report(seconds: float, doing: str) -> None:
    rank = os.environ.get("RANK", "0")
    sys.stderr.write(f"process {rank}: no step has ended for {seconds:.0f} s; it is {doing}. Its threads:\n")
    sys.stderr.flush()
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
