"""Tests of atomic writes, JSON files and SHA-256 digests."""

import hashlib
import json
import os

import pytest

from internvl_chat.utils.files import (
    append_json_line,
    atomic_path,
    file_sha256,
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


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(b"abc") == file_sha256(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()
