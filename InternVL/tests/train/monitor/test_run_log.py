"""Lines of a run that a full disk refuses are written later, whole and in order."""

import errno
import json
from pathlib import Path

import pytest

from internvl_chat.train.monitor.run_log import AppendedFile, StepLog


def rows(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def full(monkeypatch):
    """A disk that takes so many bytes of the next write, or everything (None)."""
    state = {"room": None}
    original = Path.open

    class Stream:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.stream.close()

        def tell(self):
            return self.stream.tell()

        def write(self, content):
            if state["room"] is None:
                return self.stream.write(content)
            self.stream.write(content[: state["room"]])
            self.stream.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(
        Path,
        "open",
        lambda path, mode="r", **options: (
            Stream(original(path, mode)) if mode == "ab" else original(path, mode, **options)
        ),
    )
    return state


@pytest.mark.parametrize("room", [0, 5, 30])
def test_no_line_is_lost_and_none_is_cut(tmp_path, caplog, full, room):
    file = AppendedFile(tmp_path / "ledger.jsonl")
    file.append({"step": 1})
    full["room"] = room
    file.append({"step": 2})
    file.append({"step": 3, "records": [["größe", 1]]})
    assert rows(file.path) == [{"step": 1}]
    assert caplog.text.count("cannot be written to (No space left on device)") == 1
    full["room"] = None
    file.append({"step": 4})
    assert rows(file.path) == [{"step": 1}, {"step": 2}, {"step": 3, "records": [["größe", 1]]}, {"step": 4}]


def test_a_folder_that_comes_later(tmp_path, caplog):
    file = AppendedFile(tmp_path / "later/metrics.jsonl")
    file.append({"step": 1})
    assert "cannot be written to" in caplog.text
    file.path.parent.mkdir()
    file.append({"step": 2})
    assert rows(file.path) == [{"step": 1}, {"step": 2}]


def test_a_step_has_a_line_in_both_files(tmp_path):
    log = StepLog(tmp_path)
    log.write({"step": 1, "loss": 2.5}, {"step": 1, "trained": [["a", 0]]})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]
    assert rows(tmp_path / "ledger.jsonl") == [{"step": 1, "trained": [["a", 0]]}]
