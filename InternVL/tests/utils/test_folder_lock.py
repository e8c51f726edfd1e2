"""Tests of the folder lock between processes."""

import os
import subprocess
import sys

import pytest
from helpers import SOURCE_ROOT

from internvl_chat.utils.errors import UsageError
from internvl_chat.utils.folder_lock import LOCK, lock_folder


def test_lock_is_exclusive_and_reports_its_process(tmp_path):
    lock = lock_folder(tmp_path)
    assert (tmp_path / LOCK).read_text() == str(os.getpid())
    for _ in range(2):
        with pytest.raises(UsageError, match=rf"another run \(process {os.getpid()}\) is writing"):
            lock_folder(tmp_path)
    lock.release()
    lock_folder(tmp_path).release()


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE_ROOT)}
HOLDER = """
import os, sys
from pathlib import Path
from internvl_chat.utils.folder_lock import lock_folder
lock = lock_folder(Path(sys.argv[1]))
if os.fork() == 0:  # the child has closed its copy of the lock once it runs
    print("locked", flush=True)
sys.stdin.read()
"""


def test_lock_ends_with_its_process(tmp_path):
    """A forked child process, such as a dataloader worker, does not keep the lock."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT) as holder:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(UsageError, match=f"process {holder.pid}"):
            lock_folder(tmp_path)
        holder.kill()
        holder.wait()
        lock_folder(tmp_path).release()


def test_locked_folder_can_be_renamed(tmp_path):
    (tmp_path / "partial").mkdir()
    lock = lock_folder(tmp_path / "partial")
    (tmp_path / "partial").rename(tmp_path / "final")
    (tmp_path / "final" / LOCK).unlink()
    lock.release()
    assert not list((tmp_path / "final").iterdir())


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / LOCK).mkdir()
    with pytest.raises(OSError):
        lock_folder(tmp_path)
