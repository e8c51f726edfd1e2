"""Several processes: one report of a failure, and the exit code that it had."""

import subprocess
import sys

import pytest
from helpers import SOURCE_ROOT

SCRIPT = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    {act}
time.sleep(60)
"""


def launch(tmp_path, act):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(act=act))
    command = [
        sys.executable,
        "-m",
        "internvl_chat.train.distributed.launch",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    return subprocess.run(
        [*command, str(script)], capture_output=True, text=True, timeout=120, cwd=SOURCE_ROOT
    )


@pytest.mark.parametrize(
    ("act", "code", "report"),
    [
        ("sys.exit(2)", 2, ""),
        ("sys.exit(7)", 7, "process 1 failed with exit code 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "process 1 was ended by SIGKILL"),
    ],
)
def test_exit_code_of_the_process_that_failed(tmp_path, act, code, report):
    result = launch(tmp_path, act)
    assert result.returncode == code
    assert report in result.stderr
    assert "Traceback" not in result.stderr


def test_success(tmp_path):
    script = tmp_path / "fine.py"
    script.write_text("import os; print(os.environ['WORLD_SIZE'])")
    command = [
        sys.executable,
        "-m",
        "internvl_chat.train.distributed.launch",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    result = subprocess.run([*command, str(script)], capture_output=True, text=True, cwd=SOURCE_ROOT)
    assert (result.returncode, result.stdout.split()) == (0, ["2", "2"])
