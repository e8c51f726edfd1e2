"""Hostile lines, files and meta files, each with its error message or result."""

import json
import logging

import pytest
from fuzzing import time_limit
from small_sets import encoder, entry_of, image_record, text_record, write_set

from internvl_chat.data.audit.checks import audit
from internvl_chat.data.audit.report import write_report
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources import jsonl
from internvl_chat.data.sources.meta import DatasetSpec, load_meta
from internvl_chat.utils.errors import DataError, ModelError


def problem_of(folder, content: bytes) -> tuple[str, str]:
    """Return the kind and message of the only problem of a file's second record."""
    first = json.dumps(text_record(0)).encode()
    file = folder / "a.jsonl"
    file.write_bytes(first + b"\n" + content + b"\n")
    with time_limit():
        found = audit([DatasetSpec("a", folder / "images", file)], encoder(), cache=folder / "cache")
    [problem] = found.problems
    assert (problem.line, found.sets[0].usable) == (2, 1)
    return problem.kind, problem.message


def samples_of(folder, content: bytes) -> list:
    """Return the samples of a file of usable records."""
    file = folder / "a.jsonl"
    file.write_bytes(content)
    with time_limit():
        found = audit([DatasetSpec("a", folder / "images", file)], encoder(), cache=folder / "cache")
        assert found.problems == []
        return [found.opened[0].load(i) for i in range(found.sets[0].usable)]


class TestLines:
    def test_not_utf8(self, folder):
        line = json.dumps(text_record(1, answer="caf\u00e9"), ensure_ascii=False).encode("latin-1")
        assert problem_of(folder, line) == ("encoding", f"not UTF-8 at byte {line.index(0xE9)}")

    def test_utf16(self, folder):
        assert problem_of(folder, json.dumps(text_record(1)).encode("utf-16-le"))[0] in ("json", "encoding")

    def test_lone_surrogate(self, folder):
        kind, message = problem_of(folder, json.dumps(text_record(1, answer="a\ud800")).encode())
        assert (kind, message) == ("encoding", "message 2 is not valid Unicode at character 2")

    def test_byte_order_mark_and_windows_lines(self, folder):
        plain = [json.dumps(text_record(i)).encode() for i in range(3)]
        ours = samples_of(folder, b"\xef\xbb\xbf" + b"\r\n".join(plain) + b"\r\n")
        reference = samples_of(folder, b"\n".join(plain))
        assert [s.id for s in ours] == ["r0", "r1", "r2"]
        for a, b in zip(ours, reference, strict=True):
            assert a.encoded.input_ids.tolist() == b.encoded.input_ids.tolist()

    def test_byte_order_mark_within_the_file(self, folder):
        kind, message = problem_of(folder, b"\xef\xbb\xbf" + json.dumps(text_record(1)).encode())
        assert (kind, message.startswith("not valid JSON")) == ("json", True)

    @pytest.mark.parametrize("location", ["before", "within", "between", "alone"])
    def test_nul_bytes(self, folder, location):
        line = json.dumps(text_record(1)).encode()
        damaged = {"before": b"\0" + line, "within": line.replace(b"a cat", b"a\0cat"),
                   "between": line.replace(b": ", b":\0 "), "alone": bytes(20)}[location]  # fmt: skip
        kind, message = problem_of(folder, damaged)
        assert (kind, message.startswith("not valid JSON")) == ("json", True)

    def test_escaped_nul_is_text(self, folder):
        [sample] = samples_of(folder, json.dumps(text_record(1, answer="a\0cat")).encode())
        assert "a\0cat" in encoder().tokenizer.decode(sample.encoded.input_ids)

    def test_50_megabytes_of_an_ignored_key(self, folder):
        line = json.dumps(text_record(1, source="x" * 50_000_000)).encode()
        [sample, other] = samples_of(folder, line + b"\n" + json.dumps(text_record(2)).encode())
        assert [sample.id, other.id] == ["r1", "r2"]

    def test_50_megabytes_of_text(self, folder):
        kind, message = problem_of(folder, json.dumps(text_record(1, answer="cat " * 12_500_000)).encode())
        assert (kind, message) == ("too long", "50,000,011 characters cannot fit in max_seq_length 400")

    def test_line_too_long(self, folder, monkeypatch):
        monkeypatch.setattr(jsonl, "_MAX_RECORD_BYTES", 10_000)
        line = json.dumps(text_record(1, source="x" * 20_000)).encode()
        assert problem_of(folder, line) == (
            "line too long", f"the record has {len(line):,} bytes, more than the limit of 10,000"
        )  # fmt: skip

    def test_70_megabytes_are_not_read(self, folder, monkeypatch):
        (folder / "sparse.jsonl").touch()
        with (folder / "sparse.jsonl").open("r+b") as stream:
            stream.truncate(70_000_000)
        records = RecordSet(DatasetSpec("a", folder, folder / "sparse.jsonl"), encoder())
        monkeypatch.setattr("os.pread", lambda *_: pytest.fail("was read"))
        with pytest.raises(DataError, match="70,000,000 bytes, more than the limit of 67,108,864") as caught:
            records.check(0)
        assert caught.value.kind == "line too long"

    @pytest.mark.parametrize("unit", [b"[],", b"{},", b'[{"":[]}],'])
    def test_a_million_lists(self, folder, unit):
        line = b'{"x": [' + unit * 300_000 + b"0]}"
        assert problem_of(folder, line) == ("structure", "the record has more than 200,000 lists and objects")

    @pytest.mark.parametrize("depth", [500, 5_000, 90_000])
    def test_depth(self, folder, depth):
        for name in ("id", "conversations", "image", "role"):
            record = {**text_record(1), "x": 0}
            if name == "role":
                record["conversations"][0]["from"] = "DEEP"
            else:
                record[name] = "DEEP"
            line = json.dumps(record).replace('"DEEP"', "[" * depth + "]" * depth).encode()
            if name == "id" and depth < 90_000:  # a valid id, unless this Python's parser gives up
                file = folder / "deep.jsonl"
                file.write_bytes(line)
                assert (
                    audit([DatasetSpec("a", folder, file)], encoder(), cache=folder / "c").sets[0].usable <= 1
                )
                continue
            kind, message = problem_of(folder, line)
            assert kind in ("json", "structure", "role")
            assert len(message) < 700

    def test_numbers_of_many_digits(self, folder):
        line = b'{"id": ' + b"7" * 5000 + b', "conversations": []}'
        assert problem_of(folder, line) == ("json", "not valid JSON: a number has too many digits")
        (folder / "a.json").write_bytes(b"[\n" + line + b"]")
        with pytest.raises(DataError, match="line 2: not valid JSON: a number has too many digits"):
            RecordSet(DatasetSpec("a", folder, folder / "a.json"), encoder())

    def test_a_file_of_empty_lines_takes_little_memory(self, folder):
        file = folder / "empty.jsonl"
        file.write_bytes(b"\n" * 30_000_000 + b'{"a": 1}\n')
        with time_limit():
            records = jsonl.RecordFile(file)
        assert (len(records), records.line(0)) == (1, 30_000_001)

    def test_more_images_than_files_can_be_open(self, folder):
        record = image_record(1, *["a.png"] * 3000)
        kind, message = problem_of(folder, json.dumps(record).encode())
        assert (kind, message) == ("too long", "3,000 images cannot fit in max_seq_length 400")

    def test_array_too_large(self, folder, monkeypatch):
        monkeypatch.setattr(jsonl, "_MAX_ARRAY_BYTES", 100)
        (folder / "a.json").write_text(json.dumps([text_record(i) for i in range(9)]))
        with pytest.raises(DataError, match=r"limit of 100 for a JSON array; use \.jsonl"):
            jsonl.RecordFile(folder / "a.json")


class TestMetas:
    @pytest.fixture
    def read(self, folder):
        write_set(folder, [text_record(0)])

        def read(**changes):
            (folder / "meta.json").write_text(json.dumps({"a": entry_of(folder) | changes}))
            return load_meta(folder / "meta.json", folder)

        return read

    @pytest.mark.parametrize(("change", "message"), [
        ({"max_dynamic_patch": 10**9}, "'max_dynamic_patch' must be a whole number from 1 to 100"),
        ({"repeat_time": 10**12}, "a whole number up to 1000, found 1000000000000"),
        ({"repeat_time": 1e308}, "a whole number up to 1000, found 1e+308"),
        ({"length": "9" * 4000}, "'length' must be a number of records, found '999"),
        ({"annotation": "x" * 5000}, "does not exist"),
        ({"annotation": "a\0b"}, "does not exist"),
        ({"root": "x" * 10**6, "annotation": 3}, "'annotation' must be a path, found 3"),
        ({"data_augment": "x" * 10**6}, "'data_augment' must be true or false"),
    ])  # fmt: skip
    def test_values_out_of_range(self, read, change, message):
        with pytest.raises(DataError) as caught:
            read(**change)
        assert message in str(caught.value)
        assert len(str(caught.value)) < 8000

    def test_deep_values(self, folder):
        (folder / "meta.json").write_text('{"a": {"repeat_time": ' + "[" * 900 + "]" * 900 + "}}")
        with pytest.raises(DataError, match="'repeat_time' must be"):
            load_meta(folder / "meta.json", folder)

    @pytest.mark.parametrize("name", ["x" * 10**6, "a\x1b[2J", "\ud800"])
    def test_names(self, folder, name):
        (folder / "meta.json").write_text(json.dumps({name: entry_of(folder)}))
        with pytest.raises(
            DataError, match="too long or not printable; use at most 200 printable characters"
        ) as caught:
            load_meta(folder / "meta.json", folder)
        assert len(str(caught.value)) < 1000

    def test_long_unknown_key(self, read, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("internvl_chat"), "propagate", True)
        with time_limit():
            assert len(read(**{"x" * 10**7: 1})) == 1
        assert len(caplog.text) < 1000

    def test_digits(self, folder):
        (folder / "meta.json").write_text('{"a": ' + "1" * 5000 + "}")
        with pytest.raises(DataError, match="a number has too many digits"):
            load_meta(folder / "meta.json", folder)

    def test_many_keys(self, folder):
        entry = {"root": ".", "annotation": "qa.jsonl", "data_augment": False, "repeat_time": 1}
        write_set(folder, [text_record(0)])
        (folder / "meta.json").write_text(json.dumps({str(i): entry for i in range(20_000)}))
        with time_limit():
            assert len(load_meta(folder / "meta.json", folder)) == 20_000

    def test_annotation_file_as_meta_file(self, folder, monkeypatch):
        monkeypatch.setattr("internvl_chat.data.sources.meta._MAX_FILE_BYTES", 100)
        (folder / "meta.json").write_text("{" + " " * 200 + "}")
        with pytest.raises(DataError, match="limit of 100 for a meta file; is it an annotation file"):
            load_meta(folder / "meta.json", folder)

    def test_tile_limit_of_preprocessing(self):
        with pytest.raises(ModelError, match="max_dynamic_patch 101 must be at most 100"):
            Preprocessing(max_dynamic_patch=101)


def test_report_with_hostile_names(folder):
    names = ["\ud800", "a\0", "<b>", "\x1b[2J", "x" * 5000, "中", "$x_{", "_"]
    lines = [json.dumps({"id": name, "conversations": []}).encode() for name in names]
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    spec = DatasetSpec("$x_{_ <i>", folder, folder / "a.jsonl")
    page = write_report(folder / "report", audit([spec], encoder(), cache=folder / "cache"))
    assert "<i>" not in page.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (folder / "report/problems.jsonl").read_text().splitlines()]
    assert len(rows) == len(names)
    assert all(row["id"].isprintable() for row in rows)
