"""The command `m3llm report`."""

import json
import threading
import time

import pytest
from run_files import complete_run, session, write_lines

from benchmarks.run_report import write_run
from internvl_chat.cli import main as m3llm
from internvl_chat.commands import report
from internvl_chat.train import internvl_chat_finetune


def test_report_is_written_to_the_run(tmp_path, capsys):
    folder = complete_run(tmp_path / "run", 5)
    assert m3llm(["report", str(folder), str(folder / "../run")]) == 0
    file = folder / "report.html"
    assert capsys.readouterr().out == f"report: {file}\n"
    assert 'id="chart-loss"' in file.read_text()


def test_several_runs_and_another_file(tmp_path, monkeypatch):
    folders = [str(complete_run(tmp_path / name, 5)) for name in "ab"]
    monkeypatch.chdir(tmp_path)
    assert m3llm(["report", *folders]) == 0
    assert "<title>a and b</title>" in (tmp_path / "comparison.html").read_text()
    assert m3llm(["report", *folders, "--out", "x.html"]) == 0
    assert (tmp_path / "x.html").is_file()


def test_bad_arguments(tmp_path, capsys, monkeypatch):
    for argv, message in (
        ([tmp_path], "contains no run"),
        ([tmp_path / "none"], "no such folder"),
        ([complete_run(tmp_path / "run", 1), "--out", tmp_path], "is a folder"),
        ([tmp_path / "run", "--out", tmp_path / "no/x.html"], f"the folder {tmp_path / 'no'} does not exist"),
    ):
        assert m3llm(["report", *map(str, argv)]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert m3llm(["report", str(tmp_path / "run")]) == 2
    assert "m3llm report requires plotly and jinja2: pip install 'm3llm[ui]'" in capsys.readouterr().err


@pytest.fixture
def fast(monkeypatch):
    """Look for changes all the time."""
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(0.01))


def wait_for(file, text):
    """Wait until a file contains a text."""
    end = time.monotonic() + 60
    while not (file.exists() and text in file.read_text()):
        assert time.monotonic() < end, text
        threading.Event().wait(0.05)


def test_watching_ends_with_the_run(tmp_path, fast):
    folder = tmp_path / "run"
    write_run(folder, 3)
    write_lines(folder / "sessions.jsonl", session(0, 4))
    codes = []
    thread = threading.Thread(target=lambda: codes.append(m3llm(["report", str(folder), "--watch"])))
    thread.start()
    wait_for(folder / "report.html", "unfinished: step 3 of 4")
    assert f'data-seconds="{report.WATCH_SECONDS}"' in (folder / "report.html").read_text()
    write_lines(folder / "metrics.jsonl", {"step": 4, "loss": 1.0})
    wait_for(folder / "report.html", "unfinished: step 4 of 4")
    (folder / "train_results.json").write_text(json.dumps({"step": 4}))
    thread.join(timeout=60)
    assert codes == [0]
    text = (folder / "report.html").read_text()
    assert "finished</span>" in text and "data-seconds" not in text


def test_watching_ends_with_ctrl_c(tmp_path, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    write_run(folder, 3)
    monkeypatch.setattr(time, "sleep", interrupt)
    assert m3llm(["report", str(folder), "--watch"]) == 0
    assert "data-seconds" not in (folder / "report.html").read_text()


@pytest.fixture
def logged(monkeypatch):
    """Messages of the training script."""
    messages = []
    for level in ("info", "warning"):
        append = lambda text, *args: messages.append(text % args)  # noqa: E731
        monkeypatch.setattr(internvl_chat_finetune.logger, level, append)
    return messages


def test_run_without_plotly_has_no_report(tmp_path, monkeypatch, logged):
    monkeypatch.setattr(internvl_chat_finetune, "find_spec", lambda name: None)
    internvl_chat_finetune.write_run_report(tmp_path)
    assert logged == ["no report.html: it requires plotly (pip install 'm3llm[ui]')"]
    assert not list(tmp_path.iterdir())


def test_failing_report_does_not_fail_the_run(tmp_path, monkeypatch, logged):
    def fail(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr("internvl_chat.train.report.page.write_report", fail)
    internvl_chat_finetune.write_run_report(tmp_path)
    assert logged == [f"{tmp_path}/report.html: not written (RuntimeError: broken)"]
