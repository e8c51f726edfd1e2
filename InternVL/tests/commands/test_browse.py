"""`m3llm data browse`: start, stop, and invalid command lines."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

from helpers import HANG_SECONDS, SOURCE_ROOT
from small_sets import text_record, write_lines

from internvl_chat.cli import main as m3llm


def test_start_and_stop(tmp_path):
    """An annotation file without a model, on a free port; Ctrl+C ends the command without a traceback."""
    file = write_lines(tmp_path / "mine.jsonl", [text_record(n) for n in range(3)])
    command = [sys.executable, "-m", "internvl_chat.cli", "data", "browse", str(file), "--image_root", "."]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE_ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--port", "0"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stderr.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
        page = urllib.request.urlopen(url, timeout=HANG_SECONDS).read().decode()
        assert "<h1>mine.jsonl</h1>" in page and "/record/0/2" in page
    finally:
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=HANG_SECONDS)[1]
    assert (process.returncode, errors) == (0, "")


def test_port_in_use(sample_data, capfd):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert m3llm(["data", "browse", str(sample_data / "train.json"), "--port", port]) == 2
    assert f"port {port} is in use" in capfd.readouterr().err


def test_no_usable_file(tmp_path, capfd):
    meta = tmp_path / "meta.json"
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("")
    meta.write_text(
        '{"one": {"root": ".", "annotation": "a.jsonl"}, "two": {"root": ".", "annotation": "b.jsonl"}}'
    )
    assert m3llm(["data", "browse", str(meta), "--data_root", str(tmp_path), "--port", "0"]) == 1
    error = capfd.readouterr().err
    assert "2 problems:" in error and error.count("contains no records") == 2


def test_token_options_require_a_model(sample_data, capfd):
    argv = ["data", "browse", str(sample_data / "train.json"), "--max_seq_length", "100", "--port", "0"]
    assert m3llm(argv) == 2
    assert "require --model" in capfd.readouterr().err


def test_missing_library(sample_data, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert m3llm(["data", "browse", str(sample_data / "train.json")]) == 2
    assert "m3llm data browse requires fastapi: pip install 'm3llm[ui]'" in capfd.readouterr().err
