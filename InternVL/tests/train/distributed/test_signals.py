"""Stop signals are recorded; a second Ctrl-C ends the process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import HANG_SECONDS, SOURCE_ROOT

from internvl_chat.train.distributed.signals import (
    EXIT_CODE,
    LAUNCHER,
    SIGNALS,
    STOPPING,
    StopRequest,
    exit_code,
    note_start,
    report_exit,
)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_recorded(number, capfd):
    with StopRequest() as request:
        assert request.signal is None
        os.kill(os.getpid(), number)
        assert request.signal == number
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal == number  # the first one determines the exit code
    assert f"{number.name}: saving a checkpoint after this step, then stopping" in capfd.readouterr().err


def test_other_ranks_are_silent(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    with StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err == ""


def test_handlers_are_restored():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


SCRIPT = """
import os, signal, sys, time
from internvl_chat.train.distributed.signals import StopRequest
with StopRequest() as request:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    print("two close together are one", flush=True)
    time.sleep(float(sys.argv[1]))
    os.kill(os.getpid(), signal.SIGINT)
    print("still here", flush=True)
"""


def run(script, *argv, **environment):
    return subprocess.run(
        [sys.executable, "-c", script, *argv], capture_output=True, text=True, timeout=HANG_SECONDS,
        env=os.environ | {"PYTHONPATH": str(SOURCE_ROOT)} | environment,
    )  # fmt: skip


def test_second_interrupt_exits_immediately():
    result = run(SCRIPT, "1.2")
    assert result.returncode == 130
    assert result.stdout == "two close together are one\n"
    assert "interrupted twice: exiting immediately" in result.stderr


def test_interrupts_are_debounced():
    result = run(SCRIPT, "0")
    assert result.returncode == 0 and "still here" in result.stdout


def test_worker_reports_its_exit_code_to_the_launcher(tmp_path, monkeypatch):
    assert [exit_code(number) for number in SIGNALS] == [143, 130, 138]
    monkeypatch.delenv(EXIT_CODE, raising=False)
    assert report_exit(138) == 138
    monkeypatch.setenv(EXIT_CODE, str(tmp_path / "note"))
    assert report_exit(0) == 0 and not (tmp_path / "note").exists()
    assert report_exit(138) == 0
    assert (tmp_path / "note").read_text() == "138"


def test_restarts_are_recognized(tmp_path, monkeypatch):
    """Restarts by torchrun after a failure, by SLURM, and by torchrun when nodes join (not counted by it)."""
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", EXIT_CODE):
        monkeypatch.delenv(name, raising=False)
    assert not note_start() and not note_start()
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        for count in ("0", "2"):
            monkeypatch.setenv(name, count)
            assert note_start() == (count == "2")
        monkeypatch.delenv(name)
    monkeypatch.setenv(EXIT_CODE, str(tmp_path / "note"))
    for rank in ("0", "1"):  # the ranks of a node share a launcher
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert [note_start(), note_start()] == [False, True]


def test_exit_code_of_workers_that_were_restarted_does_not_count(tmp_path, monkeypatch):
    """torchrun stops workers with SIGTERM when nodes join or leave; they save and report 143."""
    monkeypatch.setenv(EXIT_CODE, str(tmp_path / "note"))
    note_start()
    assert report_exit(143) == 0 and (tmp_path / "note").exists()
    assert note_start() and not (tmp_path / "note").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is needed to simulate a full disk")
def test_exit_code_is_not_lost_on_a_full_disk(monkeypatch):
    monkeypatch.setenv(EXIT_CODE, "/dev/full")
    assert report_exit(138) == 138


ORPHAN = """
import os, subprocess, sys, time
from internvl_chat.train.distributed.signals import StopRequest, stop_with_launcher
if len(sys.argv) > 1:
    stop_with_launcher()
    with StopRequest() as request:
        print("ready", flush=True)
        for _ in range(200):
            time.sleep(0.1)
            if request.signal:
                print(request.signal.name, flush=True)
                break
else:
    os.environ["M3LLM_LAUNCHER"] = str(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", os.environ["SCRIPT"], "child"], stdout=subprocess.PIPE)
    child.stdout.readline()
    os.dup2(child.stdout.fileno(), 0)
    os.set_inheritable(0, True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is only available on Linux")
def test_launcher_exit_sends_sigterm(tmp_path):
    note = tmp_path / "note"
    script = ORPHAN.replace(
        "print(request.signal.name, flush=True)", f"open({str(note)!r}, 'w').write(request.signal.name)"
    )
    result = run(script, SCRIPT=script)
    assert result.returncode == -9
    for _ in range(100):
        if note.is_file() and note.read_text():
            break
        time.sleep(0.1)
    assert note.read_text() == "SIGTERM"


STARTED = (
    "from internvl_chat.train.distributed.signals import stop_with_launcher; "
    "stop_with_launcher(); print('on')"
)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is only available on Linux")
def test_launcher_has_already_exited():
    result = run(STARTED, **{LAUNCHER: "1"})
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "the launcher (process 1) has exited; stopping this worker\n"
    assert run(STARTED, **{LAUNCHER: str(os.getpid())}).stdout == "on\n"
    assert run(STARTED).stdout == "on\n"


def test_workers_started_after_a_signal_exit(tmp_path):
    note = tmp_path / "note"
    result = run(STARTED, **{STOPPING: "SIGUSR1", EXIT_CODE: str(note)})
    assert (result.returncode, result.stdout, note.read_text()) == (0, "", "138")
    assert run(STARTED, **{STOPPING: "SIGUSR1"}).returncode == 138
    assert run(STARTED, **{STOPPING: ""}).stdout == "on\n"


def test_signal_is_recorded_even_if_the_terminal_is_closed():
    script = """
import os, signal
from internvl_chat.train.distributed.signals import StopRequest
os.close(2)
with StopRequest() as request:
    os.kill(os.getpid(), signal.SIGTERM)
    print(request.signal.name)
"""
    assert run(script).stdout == "SIGTERM\n"
