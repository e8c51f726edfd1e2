"""`m3llm serve` as a process: the documented client, the documented check, and Ctrl+C."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from helpers import HANG_SECONDS, SOURCE_ROOT

from internvl_chat.cli import main as m3llm

PAGE = (SOURCE_ROOT / "docs/serving.md").read_text(encoding="utf-8")


class Server:
    """A process of `m3llm serve` and what it has written."""

    def __init__(self, *argv: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(SOURCE_ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "internvl_chat.cli", "serve", "--port", "0", *argv]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.written: list[str] = []
        self.url: str | None = None
        self.listening = threading.Event()
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.written.append(line)
            if found := re.search(r"http://[\d.:]+", line):
                self.url = found[0]
                self.listening.set()
        self.listening.set()

    def stop(self) -> tuple[int, str]:
        """Interrupt the process like Ctrl+C; return its exit code and output."""
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(HANG_SECONDS)
        self.reader.join()
        return code, "".join(self.written)


@pytest.fixture
def server(tiny_model):
    started = Server(str(tiny_model), "--served_model_name", "merged", "--device", "cpu")
    yield started
    started.process.kill()
    started.reader.join()


def test_documented_client_and_check(server, tiny_model, sample_data, tmp_path, monkeypatch, capsys):
    figure = next((sample_data / "images").glob("*_fig1.jpg")).read_bytes()
    for name in ("a.jpg", "b.jpg"):
        Path(tmp_path, name).write_bytes(figure)
    monkeypatch.chdir(tmp_path)
    assert server.listening.wait(HANG_SECONDS) and server.url, server.written
    [snippet] = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    snippet = snippet.replace("http://localhost:8000", server.url).replace("max_tokens=256", "max_tokens=8")
    exec(compile(snippet, "serving.md", "exec"), {})
    answer = capsys.readouterr().out
    images = [flag for name in ("a.jpg", "b.jpg") for flag in ("--image", name)]
    question = "What differs between Fig-0 and Fig-1?"
    argv = ["generate", "--model", str(tiny_model), *images, question, "--max_new_tokens", "8"]
    assert m3llm([*argv, "--device", "cpu"]) == 0
    assert answer == capsys.readouterr().out.removesuffix("\n")
    argv = ["parity", str(tiny_model), "--endpoint", server.url, "--device", "cpu", "--max_new_tokens", "2"]
    assert m3llm(argv) == 0
    body = {"model": "merged", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 20000}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body | {"stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        code, written = server.stop()
        assert "shutting down" in "".join(lines)
    assert code == 0 and "Traceback" not in written


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--port", "70000"], 2, "must be from 0 to 65535"),
        (["--host", "256.0.0.1"], 2, "--host 256.0.0.1 --port 8000"),
        (["--max_queue", "0"], 2, "must be at least 1"),
    ],
)
def test_user_errors(tiny_model, argv, code, message, capsys):
    try:
        found = m3llm(["serve", str(tiny_model), *argv])
    except SystemExit as stop:
        found = stop.code
    assert found == code
    assert message in capsys.readouterr().err


def test_missing_package(tiny_model, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "fastapi" else name)
    assert m3llm(["serve", str(tiny_model)]) == 2
    assert capsys.readouterr().err == "m3llm: m3llm serve requires fastapi: pip install 'm3llm[ui]'\n"


def test_missing_model(capsys):
    assert m3llm(["serve", "/no/such/model", "--port", "0"]) == 1
    assert "no such model folder" in capsys.readouterr().err
