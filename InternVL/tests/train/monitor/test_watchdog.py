"""Silence is reported with the activity of the rank and all stacks."""

import time

from internvl_chat.train.monitor.watchdog import Watchdog


def stuck_in_a_collective() -> None:
    time.sleep(0.9)


def test_a_long_silence_is_reported(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "3")
    with Watchdog(0.4) as watchdog:
        watchdog.note("in step 7, records qa-bbox 12")
        stuck_in_a_collective()
    reported = capfd.readouterr().err
    assert (
        "rank 3: no step has finished for 0 s; it is in step 7, records qa-bbox 12. All stacks:" in reported
    )
    assert "in stuck_in_a_collective" in reported


def test_notes_keep_it_quiet(capfd):
    with Watchdog(1.0) as watchdog:
        for step in range(15):
            watchdog.note(f"in step {step}")
            time.sleep(0.1)
    assert capfd.readouterr().err == ""


def test_zero_disables_it(capfd):
    with Watchdog(0) as watchdog:
        watchdog.note("in step 1")
        time.sleep(0.3)
    assert capfd.readouterr().err == ""


def test_it_ends_with_the_run(capfd):
    with Watchdog(0.4):
        pass
    time.sleep(1.2)
    assert capfd.readouterr().err == ""
