"""Lines that do not fit on a full disk are written later, complete and in order."""

import errno
import json
from pathlib import Path

import pytest

from internvl_chat.train.monitor.run_log import RunLog
from internvl_chat.utils.files import JsonLinesFile


def rows(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def full(monkeypatch):
    """Limit the number of bytes of the next write; None for no limit."""
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
def test_no_line_is_lost_or_incomplete(tmp_path, caplog, full, room):
    file = JsonLinesFile(tmp_path / "ledger.jsonl")
    file.append({"step": 1})
    full["room"] = room
    file.append({"step": 2})
    file.append({"step": 3, "records": [["größe", 1]]})
    assert rows(file.path) == [{"step": 1}]
    assert caplog.text.count("cannot be written (No space left on device)") == 1
    full["room"] = None
    file.append({"step": 4})
    assert rows(file.path) == [{"step": 1}, {"step": 2}, {"step": 3, "records": [["größe", 1]]}, {"step": 4}]


def test_a_folder_that_is_created_later(tmp_path, caplog):
    file = JsonLinesFile(tmp_path / "later/metrics.jsonl")
    file.append({"step": 1})
    assert "cannot be written" in caplog.text
    file.path.parent.mkdir()
    file.append({"step": 2})
    assert rows(file.path) == [{"step": 1}, {"step": 2}]


def test_a_step_has_a_line_in_both_files(tmp_path):
    log = RunLog(tmp_path)
    log.write({"step": 1, "loss": 2.5}, {"step": 1, "trained": [["a", 0]]})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]
    assert rows(tmp_path / "ledger.jsonl") == [{"step": 1, "trained": [["a", 0]]}]


def test_validations_have_a_file_of_their_own(tmp_path):
    log = RunLog(tmp_path)
    log.append_validation({"step": 1, "loss": 2.5})
    log.flush()
    assert rows(tmp_path / "validation.jsonl") == [{"step": 1, "loss": 2.5}]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_skipped_records_are_read_from_the_ledger(tmp_path):
    log = RunLog(tmp_path)
    assert log.skipped() == []
    log.write_excluded([{"dataset": "a", "index": 3, "message": "no such file"}])
    log.write(
        {}, {"step": 1, "trained": [["a", 0]], "skipped": [{"dataset": "b", "index": 1, "message": "x"}]}
    )
    log.write({}, {"step": 2, "skipped_because": "the loss is nan", "trained": [["a", 1]]})
    log.flush()
    assert rows(tmp_path / "ledger.jsonl")[0]["step"] == 0
    assert RunLog(tmp_path).skipped() == [("a", 3), ("b", 1)]
