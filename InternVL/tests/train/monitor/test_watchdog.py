"""Inactivity is reported with the rank's activity and the stacks of all threads."""

import re
import time
from types import SimpleNamespace

import pytest
from helpers import HANG_SECONDS

from internvl_chat.train.monitor import watchdog as module
from internvl_chat.train.monitor.watchdog import Watchdog


@pytest.fixture
def clock(monkeypatch):
    """Replace the watchdog's clock with a fake one."""
    clock = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
    return clock


def stuck_in_a_collective(capfd) -> str:
    """Wait for the report."""
    reported, began = "", time.monotonic()
    while "stuck_in_a_collective" not in reported and time.monotonic() - began < HANG_SECONDS:
        time.sleep(0.05)
        reported += capfd.readouterr().err
    return reported


def test_inactivity_is_reported(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "3")
    with Watchdog(0.4) as watchdog:
        watchdog.note("running step 7 on the records qa-bbox 12")
        reported = stuck_in_a_collective(capfd)
    assert re.search(
        r"rank 3: no progress for \d+ s while running step 7 on the records qa-bbox 12", reported
    )
    assert "in stuck_in_a_collective" in reported


def test_notes_reset_the_timer(clock, capfd):
    with Watchdog(1.0) as watchdog:
        for step in range(6):
            clock.seconds += 0.9
            watchdog.note(f"in step {step}")
            time.sleep(0.1)
    assert capfd.readouterr().err == ""


def test_zero_disables_it(clock, capfd):
    with Watchdog(0) as watchdog:
        watchdog.note("in step 1")
        clock.seconds += 1e6
        time.sleep(0.3)
    assert capfd.readouterr().err == ""


def test_watchdog_ends_with_the_run(clock, capfd):
    with Watchdog(0.4):
        pass
    clock.seconds += 1e6
    time.sleep(0.5)
    assert capfd.readouterr().err == ""
