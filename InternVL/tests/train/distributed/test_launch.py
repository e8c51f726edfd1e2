"""The torchrun wrapper: exit codes, signals, restarts, and the log."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers import HANG_SECONDS, SOURCE_ROOT

from internvl_chat.train.distributed import launch

PATIENCE = HANG_SECONDS

# Like training, stops after a step on a signal, or ends after the last step.
STEPS = """
import os, sys, time
from pathlib import Path
from internvl_chat.train.distributed.signals import StopRequest, exit_code, report_exit, stop_with_launcher
stop_with_launcher()
sys.stdout.reconfigure(line_buffering=True)  # both workers share a pipe: one write per line
folder = Path(sys.argv[2])
(folder / "metrics.jsonl").touch()
with StopRequest() as request:
    sys.stdout.write(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} is ready\\n")
    while not request.signal and not (folder / "end").exists():
        time.sleep(0.02)
    while (folder / "hang").exists():
        time.sleep(0.02)
if request.signal:
    sys.stdout.write(f"saved after {request.signal.name}\\n")
    sys.exit(report_exit(exit_code(request.signal)))
"""


class Launched:
    """A launcher process that runs a script."""

    def __init__(self, tmp_path, script, *flags, ranks=1, ignored=(), stdout=subprocess.PIPE):
        self.folder, self.text = tmp_path / "out", ""
        (tmp_path / "script.py").write_text(script)
        flags = flags or ("--standalone", "--local_addr", "localhost")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "internvl_chat.train.distributed.launch", *flags,
             "--nproc_per_node", str(ranks), tmp_path / "script.py", "--output_dir", self.folder],
            env=os.environ | {"PYTHONPATH": str(SOURCE_ROOT), "OMP_NUM_THREADS": "1"},
            stdout=stdout, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            # A test that runs in the background inherits an ignored SIGINT.
            preexec_fn=lambda: [signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
                                for number in (signal.SIGINT, signal.SIGHUP)],
        )  # fmt: skip

    def wait_for(self, text, times=1):
        """Read the output until `text` has occurred the given number of times."""
        while self.text.count(text) < times:
            data = os.read(self.process.stdout.fileno(), 1 << 16)  # `communicate` skips what readline buffers
            assert data, self.text
            self.text += data.decode()

    def end(self):
        """Wait for the process to end; return the exit code and the output."""
        rest, _ = self.process.communicate(timeout=PATIENCE)
        self.text += rest
        return self.process.returncode, self.text

    def log(self):
        return (self.folder / "training_log.txt").read_text()


@pytest.fixture
def start(tmp_path):
    started = []

    def start(*args, **kwargs):
        started.append(Launched(tmp_path, *args, **kwargs))
        return started[-1]

    yield start
    for one in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*psutil.Process(one.process.pid).children(recursive=True), one.process]:
                process.kill()


@pytest.mark.parametrize(
    ("act", "code", "report"),
    [
        ("sys.exit(2)", 2, "training did not start (exit code 2)"),
        pytest.param("sys.exit(7)", 7, "rank 1 failed with exit code 7", marks=pytest.mark.slow),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "rank 1 was killed by SIGKILL"),
    ],
)
def test_exit_code_of_the_failed_worker(start, act, code, report):
    script = f"import os, signal, sys, time\nif os.environ['RANK'] == '1': {act}\ntime.sleep(60)"
    run = start(script, ranks=2)
    found, output = run.end()
    assert found == code
    assert report in output
    assert "Traceback" not in output
    assert not run.folder.exists()


def test_log_and_terminal(start, tmp_path):
    script = """
import os, sys
print(os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ.get("M3LLM_TERMINAL"), flush=True)
sys.stderr.write("step 1\\rstep 2\\r")
sys.stderr.write("step 3\\nno end of line")
"""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/training_log.txt").write_text("an earlier run\n")
    run = start(script)
    code, output = run.end()
    assert code == 0
    assert output == "0 1 None\nstep 1\nstep 2\nstep 3\nno end of line"  # text mode reads \r as \n
    assert run.log() == "an earlier run\n0 1 None\nstep 3\nno end of line\n"


# Starts a run in the folder of a finished one.
STARTS = """
import sys
from pathlib import Path
results = Path(sys.argv[2]) / "train_results.json"
print("checking", flush=True)
results.unlink()
print("step 1", flush=True)
results.write_text("{}")
"""


@pytest.fixture
def finished(tmp_path):
    """The folder of a finished run."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "train_results.json").write_text("{}")
    return folder


@pytest.mark.parametrize("has_log", [True, False])
def test_failed_start_does_not_change_a_finished_run(start, finished, has_log):
    if has_log:
        (finished / "training_log.txt").write_text("finished\n")
    before = {file.name: file.read_bytes() for file in finished.iterdir()}
    code, output = start("import sys; sys.exit('cannot resume')").end()
    assert code == 1
    assert "cannot resume" in output
    assert f"training did not start (exit code 1); {finished} is unchanged" in output
    assert {file.name: file.read_bytes() for file in finished.iterdir()} == before


def test_new_run_after_a_finished_one_has_a_complete_log(start, finished):
    (finished / "training_log.txt").write_text("finished\n")
    run = start(STARTS)
    assert run.end()[0] == 0
    assert run.log() == "finished\nchecking\nstep 1\n"


@pytest.mark.parametrize(
    ("pieces", "log"),
    [
        ([b"one\ntwo\n"], b"one\ntwo\n"),
        ([b"o", b"ne", b"\n"], b"one\n"),
        ([b"one\r\n", b"two\r", b"\n"], b"one\ntwo\n"),
        ([b"\r10 %", b"\r20 %", b"\r\r30 %\nend"], b"30 %\nend\n"),
        ([b"10 %\r", b"20 %\r", b"next\n"], b"next\n"),
        ([b"\n\n", b""], b"\n\n"),
    ],
)
def test_log_lines(tmp_path, pieces, log):
    source, pipe = os.pipe()
    with (tmp_path / "terminal").open("wb") as terminal, (tmp_path / "log").open("wb") as file:
        for piece in pieces:
            os.write(pipe, piece)
        os.close(pipe)
        launch._copy(source, terminal.fileno(), file.fileno(), tmp_path / "none")
    os.close(source)
    assert (tmp_path / "log").read_bytes() == log
    assert (tmp_path / "terminal").read_bytes() == b"".join(pieces)


def test_partial_progress_lines_do_not_accumulate(tmp_path, monkeypatch):
    """Overwritten text is dropped after each read, not only at the end of the line."""
    pieces = [b"\r%d %%" % i for i in range(100)] + [b""]
    monkeypatch.setattr(launch.os, "read", lambda *_: pieces.pop(0))
    written = {1: b"", 2: b""}
    monkeypatch.setattr(launch, "_write", lambda file, data: written.update({file: written[file] + data}))
    launch._copy(0, 1, 2, tmp_path / "none")
    assert written[2] == b"99 %\n"


def test_full_disk_does_not_stop_the_run(start, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/training_log.txt").symlink_to("/dev/full")
    assert start("print('finished')").end() == (0, "finished\n")


def test_output_folder_that_cannot_be_created(tmp_path, start):
    (tmp_path / "out").write_text("a file")
    code, output = start("print('never')").end()
    assert code == 2
    assert "cannot write to the output folder" in output and "never" not in output


@pytest.mark.parametrize(
    ("name", "code", "obeyed"),
    [
        ("SIGTERM", 143, "SIGTERM"),
        pytest.param("SIGINT", 130, "SIGINT", marks=pytest.mark.slow),
        pytest.param("SIGUSR1", 138, "SIGUSR1", marks=pytest.mark.slow),
        ("SIGHUP", 143, "SIGTERM"),
    ],
)
def test_signals_are_forwarded(start, name, code, obeyed):
    """Workers that stop after a step are not restarted."""
    run = start(STEPS, "--standalone", "--max_restarts", "1", ranks=2)
    run.wait_for("is ready", times=2)
    run.process.send_signal(signal.Signals[name])
    found, output = run.end()
    assert found == code, output
    assert output.count(f"saved after {obeyed}") == output.count("saved after") == 2
    assert output.count("saving a checkpoint after this step") == 1  # only rank 0 prints it
    assert f"stopped by a signal (exit code {code}); see {run.folder}/training_log.txt" in output
    assert output.startswith(run.log())


def test_second_interrupt_ends_the_run(start, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/hang").touch()
    run = start(STEPS)
    run.wait_for("is ready")
    run.process.send_signal(signal.SIGINT)
    run.wait_for("saving a checkpoint after this step")
    time.sleep(1.2)
    run.process.send_signal(signal.SIGINT)
    code, output = run.end()
    assert code == 130
    assert "interrupted twice" in output and "saved" not in output


@pytest.mark.slow
def test_nohup_still_ignores_sighup(start):
    run = start(STEPS, ignored=[signal.SIGHUP])
    run.wait_for("is ready")
    run.process.send_signal(signal.SIGHUP)
    (run.folder / "end").touch()
    code, output = run.end()
    assert (code, "saved" in output) == (0, False)


def test_failed_workers_are_restarted(start, tmp_path):
    script = f"""
import os, sys
from pathlib import Path
if Path({str(tmp_path / "failed")!r}).exists():
    print("restarted", os.environ["RANK"], flush=True)
elif os.environ["RANK"] == "0":
    Path({str(tmp_path / "failed")!r}).touch()
    sys.exit(3)
"""
    code, output = start(script, "--standalone", "--max_restarts", "2", ranks=1).end()
    assert code == 0, output
    assert "restarted 0" in output


def test_reported_failure_is_not_restarted(start):
    """For example, a stopped run that could not write its last checkpoint."""
    script = """
import sys
from internvl_chat.train.distributed.signals import report_exit
print("started", flush=True)
sys.exit(report_exit(1))
"""
    run = start(script, "--standalone", "--max_restarts", "2")
    run.folder.mkdir()
    code, output = run.end()
    assert code == 1, output
    assert output.count("started") == 1 and "training failed with exit code 1" in output


def test_signal_during_startup_ends_the_workers(start):
    script = """
import time
from internvl_chat.train.distributed.signals import stop_with_launcher
stop_with_launcher()
print("loading", flush=True)
time.sleep(60)
"""
    run = start(script, "--standalone", "--max_restarts", "3")
    run.wait_for("loading")
    run.process.send_signal(signal.SIGTERM)
    code, output = run.end()
    assert code == 143
    assert output.count("loading") == 1 and "training did not start (exit code 143)" in output
    assert not run.folder.exists()


def test_a_signal_while_waiting_for_other_nodes(start):
    """torchrun waits inside a library call, during which Python signal handlers do not run."""
    flags = ["--nnodes", "2", "--node_rank", "0", "--master_addr", "127.0.0.1", "--master_port", "0"]
    run = start("print('never')", *flags)
    while not psutil.Process(run.process.pid).net_connections("tcp"):
        assert run.process.poll() is None
        time.sleep(0.05)
    run.process.send_signal(signal.SIGINT)
    code, output = run.end()
    assert code == 130, output
    assert "never" not in output and not run.folder.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is only available on Linux")
def test_workers_save_and_end_when_the_launcher_is_killed(start):
    """The output of the workers still reaches the terminal and the log."""
    run = start(STEPS, ranks=2)
    run.wait_for("is ready", times=2)
    run.process.kill()
    code, output = run.end()
    assert code == -signal.SIGKILL
    assert output.count("saved after SIGTERM") == 2
    assert run.log() == output


def test_workers_know_about_the_terminal(start):
    controller, terminal = pty.openpty()
    run = start("import os; print(os.environ['M3LLM_TERMINAL'], os.isatty(1))", stdout=terminal)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # EIO at the end
        while data := os.read(controller, 1024):
            shown += data
    os.close(controller)
    assert run.process.wait(PATIENCE) == 0
    assert shown == b"1 False\r\n"
    assert run.log() == "1 False\n"


def test_plain_torchrun_without_an_output_folder(tmp_path):
    (tmp_path / "script.py").write_text("import os, sys; sys.stderr.write(os.environ['WORLD_SIZE'])")
    command = [sys.executable, "-m", "internvl_chat.train.distributed.launch", "--standalone"]
    command += ["--nproc_per_node", "2", "script.py"]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, timeout=PATIENCE,
        env=os.environ | {"PYTHONPATH": str(SOURCE_ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "22")
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]
