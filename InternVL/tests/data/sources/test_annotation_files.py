"""Compressed annotation files are read; files that are not JSONL are rejected with a single message."""

import bz2
import errno
import gzip
import io
import json
import os
import pickle
import sys

import pytest
from small_sets import text_record

from internvl_chat.data.sources import annotation_files
from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.utils.errors import DataError

RECORDS = [text_record(i) for i in range(5)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def problem_of(file, content: bytes | str) -> str:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        RecordFile(file)
    assert (caught.value.file, caught.value.line) == (file, None)
    return caught.value.message


class TestCompressed:
    @pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl", "A.JSONL.GZ"])
    def test_gzip(self, tmp_path, name):
        (tmp_path / name).write_bytes(gzip.compress(LINES.encode()))
        records = RecordFile(tmp_path / name)
        assert list(records) == RECORDS
        assert records.line(3) == 4
        assert records.path == tmp_path / name
        assert list(pickle.loads(pickle.dumps(records))) == RECORDS

    def test_gzip_of_an_array(self, tmp_path):
        (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(RECORDS).encode()))
        assert list(RecordFile(tmp_path / "a.json.gz")) == RECORDS

    def test_error_names_the_compressed_file(self, tmp_path):
        file = tmp_path / "a.jsonl.gz"
        file.write_bytes(gzip.compress(LINES.encode() + b"{\n"))
        with pytest.raises(DataError) as caught:
            RecordFile(file)[5]
        assert (caught.value.file, caught.value.line) == (file, 6)

    @pytest.mark.parametrize("damage", [lambda c: c[:-20], lambda c: c[:20] + b"\0" * 9 + c[29:]])
    def test_damaged_gzip(self, tmp_path, damage):
        content = damage(gzip.compress(LINES.encode() * 50))
        assert problem_of(tmp_path / "a.jsonl.gz", content).startswith("cannot be unpacked: ")

    def test_compressed_twice(self, tmp_path):
        content = gzip.compress(gzip.compress(LINES.encode()))
        assert problem_of(tmp_path / "a.jsonl.gz", content) == "is compressed twice; decompress it once"

    def test_parquet(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        rows = [{**record, "image": None, "weight": 0.5} for record in RECORDS] * 300
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
        records = RecordFile(tmp_path / "a.parquet")
        assert list(records) == rows
        assert records.line(1234) == 1235

    def test_parquet_with_embedded_images(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        rows = [{**RECORDS[0], "image": {"bytes": b"\x89PNG", "path": "a.png"}}]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
        with pytest.raises(DataError, match="a column contains binary data; save embedded images as files"):
            RecordFile(tmp_path / "a.parquet")

    def test_damaged_parquet(self, tmp_path):
        pytest.importorskip("pyarrow")
        assert "Parquet file cannot be read" in problem_of(tmp_path / "a.parquet", b"PAR1" + bytes(100))

    def test_parquet_without_pyarrow(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        assert "install pyarrow to read it" in problem_of(tmp_path / "b.parquet", b"PAR1" + bytes(100))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (json.dumps(RECORDS, indent=1), "this is a JSON array, not one record per line; rename it to .json"),
        (json.dumps(RECORDS), "this is a JSON array"),
        ("\n\n[\n" + ",\n".join(LINES.splitlines()) + "\n]\n", "this is a JSON array"),
        ("\n".join(json.dumps(r, indent=2) for r in RECORDS), "the records span multiple lines"),
        (json.dumps(RECORDS[0], indent=2), "a single multi-line JSON object"),
        (json.dumps({"qa": {"root": ".", "annotation": "a"}}, indent=1), "this is a meta file"),
        (
            "id,question,answer\n1,q,a\n",
            "none of the first 2 lines is valid JSON (the file begins with 'id,question,",
        ),
        ("- id: 1\n  value: 2\n", "is valid JSON"),
        (LINES.replace('"', "'") * 3, "none of the first 15 lines is valid JSON"),
        (LINES.encode("utf-16"), "the text is in UTF-16; convert it to UTF-8: iconv -f UTF-16"),
        (LINES.encode("utf-16-le"), "in UTF-16"),
        (LINES.encode("utf-16-be"), "in UTF-16"),
        (LINES.encode("utf-32"), "in UTF-32"),
        (bz2.compress(LINES.encode()), "compressed with bzip2"),
        (b"PK\x03\x04" + bytes(50), "ZIP archive"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "git lfs pull"),
        ("<!DOCTYPE html>\n<html>\n</html>\n", "an HTML page"),
    ],
)
def test_rejected_with_a_single_message(tmp_path, content, part):
    assert part in problem_of(tmp_path / "a.jsonl", content)


def test_folder(tmp_path):
    (tmp_path / "b.jsonl").touch()
    (tmp_path / "a.parquet").touch()
    with pytest.raises(DataError, match=r"it is a folder; use one file per dataset: a\.parquet, b\.jsonl"):
        RecordFile(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["{broken\n" + LINES, "[1]\n" + LINES, "[1]\n", '{"a": 1} {"b": 2}\n', "{x\n{y\n{z\n", "\n\n{\n" + LINES],
)
def test_bad_lines_of_a_jsonl_file_are_errors_of_records(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    records = RecordFile(tmp_path / "a.jsonl")
    assert len(records) == len(content.split("\n")) - 1 - content.count("\n\n") - content.startswith("\n")


def test_unreadable_source_gives_no_advice_about_the_disk(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(gzip.GzipFile, "read", fail)
    message = problem_of(tmp_path / "a.jsonl.gz", gzip.compress(LINES.encode()))
    assert message == "cannot be unpacked: [Errno 5] Input/output error"


def test_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(
        annotation_files.tempfile, "NamedTemporaryFile", lambda **_: io.FileIO("/dev/full", "w")
    )
    message = problem_of(tmp_path / "a.jsonl.gz", gzip.compress(LINES.encode()))
    assert "No space left on device; if the disk is full, set TMPDIR" in message
