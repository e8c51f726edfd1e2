"""Tests of atomic writes, JSON files and SHA-256 digests."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from internvl_chat.utils.files import (
    JsonLinesFile,
    append_json_line,
    atomic_path,
    file_sha256,
    is_file,
    read_json_lines,
    sha256,
    write_json,
    write_json_lines,
)


def test_atomic_path_replaces_the_file(tmp_path):
    file = tmp_path / "x.txt"
    file.write_text("old")
    with atomic_path(file) as partial:
        partial.write_text("new")
        assert file.read_text() == "old"
        assert partial.parent == tmp_path
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_failed_write_keeps_the_old_file(tmp_path):
    file = tmp_path / "x.txt"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(file) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_write_json(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1, None], "b": "中"})
    assert (
        tmp_path / "x.json"
    ).read_bytes() == '{\n  "a": [\n    1,\n    null\n  ],\n  "b": "中"\n}\n'.encode()


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"scan\xff.png")
    write_json(tmp_path / "x.json", [name])
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == [name]


def test_json_lines(tmp_path):
    file = tmp_path / "x.jsonl"
    write_json_lines(file, ({"n": n} for n in range(2)))
    with file.open("ab") as stream:
        append_json_line(stream, {"n": "two\nlines"})
        assert len(file.read_bytes().splitlines()) == 3
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"n": 0}, {"n": 1}, {"n": "two\nlines"}
    ]  # fmt: skip


def test_interrupted_json_lines_leave_no_file(tmp_path):
    def rows():
        yield 1
        raise ValueError

    with pytest.raises(ValueError):
        write_json_lines(tmp_path / "x.jsonl", rows())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["missing", "a\0b", "n" * 5000, "."])
def test_no_file(tmp_path, name):
    assert not is_file(tmp_path / name)


def test_file(tmp_path):
    (tmp_path / "a").write_text("")
    assert is_file(tmp_path / "a")


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(b"abc") == file_sha256(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()


def rows(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def full(monkeypatch):
    """Limit the size of the next write in bytes; None for no limit."""
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


def test_flush_writes_pending_lines(tmp_path):
    """Otherwise the last lines of a run are lost if the disk was full only for a while."""
    file = JsonLinesFile(tmp_path / "later/metrics.jsonl")
    file.append({"step": 1})
    file.path.parent.mkdir()
    file.flush()
    assert rows(file.path) == [{"step": 1}]


def test_lines_of_a_file(tmp_path):
    file = tmp_path / "log"
    file.write_bytes(b'{"a": 1}\n\n  \n[1]\n\xff\n{"b": NaN}\n' + b"[" * 100_000 + b'\n{"a": 2')
    first, *damaged = list(read_json_lines(file))
    assert first == {"a": 1}
    assert [row is None for row in damaged] == [True, True, False, True, True]
    assert list(read_json_lines(file, containing=b'"a": 1')) == [{"a": 1}]
    assert list(read_json_lines(tmp_path / "none")) == list(read_json_lines(tmp_path)) == []
