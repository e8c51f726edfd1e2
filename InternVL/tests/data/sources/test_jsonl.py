"""Record files compared with Python's JSON parser, for all line endings and chunk sizes."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import internvl_chat
from internvl_chat.data.sources import jsonl
from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.utils.errors import DataError

BOM = b"\xef\xbb\xbf"
SCRIPTS = "é 中文 🩻 \u2028 \x85 \ufeff"  # str.splitlines splits at two of them


@pytest.fixture
def write(tmp_path):
    def write(content: bytes | str, name: str = "a.jsonl") -> Path:
        file = tmp_path / name
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    return write


def lines_of(records: RecordFile) -> list[int]:
    return [records.line(i) for i in range(len(records))]


def failure(records: RecordFile, index: int) -> DataError:
    with pytest.raises(DataError) as caught:
        records[index]
    return caught.value


@pytest.mark.parametrize(
    ("content", "values", "lines"),
    [
        ('{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}], [1, 2]),
        ('{"a": 1}\n{"a": 2}', [{"a": 1}, {"a": 2}], [1, 2]),
        ('\n\n{"a": 1}\n  \t\n\n{"a": 2}\n\n\n', [{"a": 1}, {"a": 2}], [3, 6]),
        ('{"a": 1}\r\n\r\n{"a": 2}\r\n', [{"a": 1}, {"a": 2}], [1, 3]),
        ('{"a": 1}\r\n{"a": 2}', [{"a": 1}, {"a": 2}], [1, 2]),
        (BOM.decode() + '{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}], [1, 2]),
        (BOM.decode() + '\n{"a": 1}', [{"a": 1}], [2]),
        ("1\n2\n\n3", [1, 2, 3], [1, 2, 4]),
        ('{"a": "' + "x" * 5000 + '"}\n[]\n', [{"a": "x" * 5000}, []], [1, 2]),
        (f'{{"a": "{SCRIPTS}"}}\n{{"b": 0}}', [{"a": SCRIPTS}, {"b": 0}], [1, 2]),
    ],
    ids=["plain", "no final newline", "blank lines", "CRLF", "CRLF, none at the end", "BOM",
         "BOM and blank line", "short", "long line", "other scripts and Unicode line ends"],
)  # fmt: skip
@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 24])
def test_records_and_their_lines(write, monkeypatch, content, values, lines, chunk):
    monkeypatch.setattr(jsonl, "_CHUNK", chunk)
    records = RecordFile(write(content))
    assert len(records) == len(values)
    assert list(records) == [records[i] for i in range(len(records))] == values
    assert lines_of(records) == lines


@settings(max_examples=60)
@given(
    rows=st.lists(
        st.one_of(st.dictionaries(st.text(max_size=4), st.text(max_size=12), max_size=2), st.none()),
        min_size=1,
        max_size=12,
    ).filter(lambda rows: any(row is not None for row in rows)),
    end=st.sampled_from(["\n", "\r\n"]),
    ascii_only=st.booleans(),
    mark=st.booleans(),
    final=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_random_files(tmp_path_factory, rows, end, ascii_only, mark, final, chunk):
    """None represents a blank line."""
    texts = ["" if row is None else json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    file = tmp_path_factory.mktemp("any") / "a.jsonl"
    file.write_bytes(BOM * mark + (end.join(texts) + end * final).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "_CHUNK", chunk)
        records = RecordFile(file)
    assert list(records) == [row for row in rows if row is not None]
    assert lines_of(records) == [number for number, row in enumerate(rows, 1) if row is not None]


def test_random_access(write):
    records = RecordFile(write("".join(f'{{"n": {i * i}}}\n' for i in range(300))))
    order = np.random.default_rng(0).permutation(300)
    assert [records[i]["n"] for i in order] == [i * i for i in order]


class TestSearch:
    @pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
    @pytest.mark.parametrize("chunk", [1, 7, 30, 1 << 24])
    @pytest.mark.parametrize("lower", [False, True])
    def test_every_record_with_a_match(self, write, monkeypatch, name, chunk, lower):
        monkeypatch.setattr(jsonl, "_CHUNK", chunk)
        words = ["a", "ab", "ABA", "b, b", "", "aaa"] * 3
        lines = [json.dumps({"text": word}) for word in words]
        content = f"[{', '.join(lines)}]" if name == "a.json" else "\n\n".join(lines)
        records = RecordFile(write(content, name))
        for text in ("a", "ab", '"}', "}, {", "b, b", "text", "none"):
            shown = [line.lower() if lower else line for line in lines]
            expected = [index for index, line in enumerate(shown) if text in line]
            assert records.search(re.compile(re.escape(text).encode()), lower=lower) == expected, text

    def test_large_records_are_not_searched(self, write, monkeypatch):
        monkeypatch.setattr(jsonl, "_CHUNK", 1)
        monkeypatch.setattr(jsonl, "_MAX_RECORD_BYTES", 12)
        records = RecordFile(write('{"a": "aaaaaa"}\n{"a": 1}\n'))
        assert records.search(re.compile(b"a")) == [1]


class TestBrokenRecords:
    def test_json(self, write):
        file = write('{"a": 1}\n\n{"a": 2,}\n{"a": 3}\n')
        records = RecordFile(file)
        error = failure(records, 1)
        assert (error.file, error.line) == (file, 3)
        assert str(error).startswith(f"{file}, line 3: not valid JSON")
        assert [records[0], records[2]] == [{"a": 1}, {"a": 3}]

    @pytest.mark.parametrize(("name", "text"), [("a.jsonl", "{}\n"), ("a.json", "[{}]")])
    @pytest.mark.parametrize(
        "record", ['{"image": "a", "image": "b"}', '{"conversations": [{"image": "a", "image": "a"}]}']
    )
    def test_duplicate_key(self, write, name, text, record):
        assert (
            failure(RecordFile(write(text.replace("{}", record), name)), 0).message == "duplicate key 'image'"
        )

    def test_truncated_line(self, write):
        assert failure(RecordFile(write('{"a": 1}\n{"a": "cut off')), 1).line == 2

    def test_two_records_in_a_line(self, write):
        assert "not valid JSON" in failure(RecordFile(write('{"a": 1} {"a": 2}\n')), 0).message

    def test_not_utf8(self, write):
        records = RecordFile(write(b'{"a": 1}\n{"a": "caf\xe9"}\n'))
        error = failure(records, 1)
        assert (error.message, error.line) == ("not UTF-8 at byte 10", 2)
        assert records[0] == {"a": 1}

    def test_utf16(self, write):
        with pytest.raises(DataError, match="the text is in UTF-16; convert it to UTF-8"):
            RecordFile(write('{"a": 1}\n'.encode("utf-16")))

    def test_too_deep(self, write):
        records = RecordFile(write("[" * 200_000 + "]" * 200_000 + "\n"))
        assert failure(records, 0).message == "JSON is nested too deeply"

    @pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\n\t\n", BOM, BOM + b"\n"])
    def test_no_records(self, write, content):
        file = write(content)
        with pytest.raises(DataError, match="contains no records") as caught:
            RecordFile(file)
        assert caught.value.file == file

    @pytest.mark.parametrize("name", ["nowhere.jsonl", "nowhere.json", "."])
    def test_no_file(self, tmp_path, name):
        with pytest.raises(DataError, match="cannot be read: ") as caught:
            RecordFile(tmp_path / name)
        assert caught.value.file == tmp_path / name


class TestArrays:
    RECORDS = ({"id": 1, "t": "]},\n["}, {"id": 2, "t": '中 \\" é'}, [3], "four")

    @pytest.mark.parametrize("indent", [None, 0, 2])
    @pytest.mark.parametrize("ascii_only", [True, False])
    @pytest.mark.parametrize("head", [b"", BOM, b" \r\n", BOM + b"\n"])
    def test_records(self, write, indent, ascii_only, head):
        text = json.dumps(self.RECORDS, indent=indent, ensure_ascii=ascii_only)
        records = RecordFile(write(head + text.encode() + b"\n", "a.json"))
        assert list(records) == list(self.RECORDS)

    def test_lines(self, write):
        text = '\n[\n  {"id": 1},\n  {\n    "id": 2\n  },\n\n  {"id": 3}, {"id": 4}\n]\n'
        records = RecordFile(write(text, "a.json"))
        assert [record["id"] for record in records] == [1, 2, 3, 4]
        assert lines_of(records) == [3, 4, 8, 8]

    def test_windows_lines(self, write):
        records = RecordFile(write('[\r\n{"id": 1},\r\n{"id": 2}\r\n]\r\n', "a.json"))
        assert list(records) == [{"id": 1}, {"id": 2}]
        assert lines_of(records) == [2, 3]

    def test_byte_order_mark_in_text_is_preserved(self, write):
        assert RecordFile(write('["a\ufeffb"]', "a.json"))[0] == "a\ufeffb"

    @pytest.mark.parametrize(
        ("text", "line"), [('[\n{"id": 1},\n{"id" 2}\n]', 3), ('[\n{"id": 1},\n{"id":\n', 4), ("[1,\n", 2)]
    )
    def test_broken_json_reports_the_line(self, write, text, line):
        with pytest.raises(DataError, match="not valid JSON") as caught:
            RecordFile(write(text, "a.json"))
        assert caught.value.line == line

    @pytest.mark.parametrize("text", ['{"a": 1}', '{"a": 1}\n{"a": 2}\n', "", "3"])
    def test_not_an_array(self, write, text):
        with pytest.raises(DataError, match=r"must contain an array.*\.jsonl"):
            RecordFile(write(text, "a.json"))

    def test_empty_array(self, write):
        with pytest.raises(DataError, match="contains no records"):
            RecordFile(write("[ ]\n", "a.json"))

    def test_not_utf8_is_reported_for_the_record(self, write):
        records = RecordFile(write(b'[\n"a",\n"\xff"\n]', "a.json"))
        assert records[0] == "a"
        assert failure(records, 1).line == 3


class TestOtherProcesses:
    def test_pickled_to_another_process(self, write):
        records = RecordFile(write('{"a": 1}\n{"a": "中"}\n'))
        assert records[0] == {"a": 1}  # opens the file before pickling
        code = "import pickle, sys; print(ascii(pickle.load(sys.stdin.buffer)[1]))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=pickle.dumps(records),
            capture_output=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(Path(internvl_chat.__file__).parents[1])},
        )
        assert done.stdout.decode().strip() == ascii({"a": "中"})

    def test_forked_with_the_file_open(self, write):
        records = RecordFile(write('{"a": 1}\n{"a": 2}\n'))
        assert records[0] == {"a": 1}
        child = os.fork()
        if child == 0:
            equal = False
            try:
                equal = records[1] == {"a": 2} and records[0] == {"a": 1}
            finally:
                os._exit(0 if equal else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert records[1] == {"a": 2}


def test_index_of_a_large_file_consists_of_arrays(write):
    count = 200_000
    file = write(b"".join(b'{"id": %d, "conversations": []}\n' % i for i in range(count)))
    records = RecordFile(file)
    assert records[123_456]["id"] == 123_456
    arrays = [value for value in vars(records).values() if isinstance(value, np.ndarray)]
    others = [value for value in vars(records).values() if not isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) == 3 * 8 * count
    assert sum(sys.getsizeof(value) for value in others) < 1000
    assert len(pickle.dumps(records)) < 3 * 8 * count + 2000


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ('[{"a": 1}]\n[{"a": 2}]', "unexpected content after", 1),
        ('[{"a": 1},\n{"a": 2}] rubbish', "unexpected content after", 2),
        ('[{"a": 1}\n{"b": 2}]', "expecting ',' or ']'", 1),
        ('[{"a": 1},,{"b": 2}]', "not valid JSON", 1),
        ('[{"a": 1},]', "not valid JSON", 1),
        ('[{"a": 1}', "expecting ',' or ']'", 1),
        ("[\n" + "[" * 100_000, "nested too deeply", 2),
    ],
)
def test_malformed_arrays(write, text, message, line):
    with pytest.raises(DataError) as caught:
        RecordFile(write(text, "a.json"))
    assert message in str(caught.value)
    assert caught.value.line == line


def test_long_line_of_whitespace(write):
    records = RecordFile(write('{"a": 1}\n' + " " * 40 + '\n{"a": 2}\n'))
    assert "only whitespace" in str(failure(records, 1))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to list the open files")
def test_file_is_closed_with_its_last_reference(write):
    def is_open() -> bool:
        return str(file) in {os.path.realpath(entry) for entry in Path("/proc/self/fd").iterdir()}

    file = write('{"id": 1}\n')
    records = RecordFile(file)
    assert records[0] == {"id": 1} and is_open()
    del records
    assert not is_open()
