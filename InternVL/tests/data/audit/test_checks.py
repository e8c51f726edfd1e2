"""Tests of the audit: problems, lengths, duplicates, the report and the cache."""

import json
import logging
import os
import re

import numpy as np
import pytest
from small_sets import break_inside, encoder, image_record, noise, text_record, write_lines, write_set

from internvl_chat.data.audit.checks import audit, check_before_training
from internvl_chat.data.audit.duplicates import find_duplicates
from internvl_chat.data.audit.report import PAGE, PROBLEMS, write_report
from internvl_chat.data.audit.statistics import group_by_kind, set_rows, set_statistics
from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.index import build as build_module
from internvl_chat.data.index.build import index_records
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources import images as images_module
from internvl_chat.data.sources.meta import DatasetSpec


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    noise(40, 10).save(tmp_path / "images/wide.png")
    noise(100, 400).save(tmp_path / "images/cut.jpg")
    content = (tmp_path / "images/cut.jpg").read_bytes()
    (tmp_path / "images/cut.jpg").write_bytes(content[: len(content) // 2])
    return tmp_path


@pytest.fixture
def check(folder):
    """Write datasets and audit them with encoder `by`."""

    def check(sets: dict[str, list], *, by=None, decode=False, **entries):
        specs = []
        for name, records in sets.items():
            file = write_lines(folder / f"{name}.jsonl", records)
            specs.append(DatasetSpec(name, folder / "images", file, **entries.get(name, {})))
        return audit(specs, by or encoder(), decode=decode, cache=folder / "cache")

    return check


def kinds(result) -> list[tuple[str, str, int | None]]:
    return [(problem.dataset, problem.kind, problem.line) for problem in result.problems]


def test_warnings_at_the_start_of_training(folder, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("internvl_chat"), "propagate", True)
    records = [text_record(i, answer="a cat</s>", rejected="b") for i in range(3)]
    sets = [write_set(folder, records, name) for name in ("a", "b")]
    check_before_training(sets, check="fast", on_bad_record="fail", max_bad_fraction=0.0)
    lines = caplog.messages[-1].splitlines()
    for name in ("a", "b"):
        for kind in ("control token", "ignored field"):
            [line] = [one for one in lines if one.startswith(f"  dataset {name}: {kind}: 3 records, for ")]
            assert f"{name}.jsonl, line 1 (record 'r0')" in line


class TestFindings:
    def test_no_problems(self, check):
        result = check({"a": [text_record(0), image_record(1, "wide.png")], "b": [text_record(2)]})
        assert result.problems == []
        assert [(findings.records, findings.used, findings.usable) for findings in result.sets] == [
            (2, 2, 2),
            (1, 1, 1),
        ]
        records = result.opened[0]
        for i in range(2):
            assert result.sets[0].lengths[i] == records.encode(i)[1].lengths

    def test_each_problem_has_its_line(self, check):
        bad = [text_record(0), {"id": "x"}, image_record(2, "no.png"), b"{", text_record(4, answer="")]
        result = check({"a": bad, "b": [text_record(1)]})
        assert kinds(result) == [
            ("a", "structure", 2), ("a", "image missing", 3), ("a", "json", 4), ("a", "empty answer", 5)
        ]  # fmt: skip
        assert [findings.usable for findings in result.sets] == [1, 1]
        assert len(result.sets[0].lengths) == 1

    def test_repeat_time_that_selects_nothing(self, check):
        result = check({"a": [text_record(0)], "b": [text_record(1)]}, a={"repeat_time": 0.5})
        assert kinds(result) == [("a", "no records", None)]
        assert "'repeat_time' 0.5 selects none of the 1 records" in result.problems[0].message

    def test_only_used_records_are_checked(self, check):
        result = check({"a": [text_record(0), text_record(1), b"{", b"{"]}, a={"repeat_time": 0.5})
        assert result.problems == []
        assert (result.sets[0].records, result.sets[0].used) == (4, 2)

    def test_truncated_image_is_found_without_full_decoding(self, check):
        result = check({"a": [image_record(0, "wide.png"), image_record(1, "cut.jpg")]})
        assert kinds(result) == [("a", "image unreadable", 2)]
        assert "image file is truncated" in result.problems[0].message
        assert (result.decoded, result.sets[0].usable) == (False, 1)

    def test_decoding_finds_damage_inside_an_image(self, check, folder):
        break_inside(folder / "images/wide.png")
        sets = {"a": [text_record(0), image_record(1, "wide.png")]}
        assert check(sets).problems == []
        full = check(sets, decode=True)
        assert kinds(full) == [("a", "image unreadable", 2)]
        assert (full.decoded, full.sets[0].usable) == (True, 1)

    def test_problems_found_by_decoding_are_cached(self, check, folder):
        break_inside(folder / "images/wide.png")
        sets = {"a": [image_record(0, "wide.png"), text_record(1)]}
        check(sets, decode=True)
        assert kinds(check(sets)) == [("a", "image unreadable", 1)]
        noise(10, 40).save(folder / "images/wide.png")
        assert check(sets).problems == []

    def test_unreadable_annotation_files(self, check, folder):
        files = {"gone": folder / "gone.jsonl", "empty": write_lines(folder / "empty.jsonl", [])}
        files["array"] = write_lines(folder / "array.json", [b'[{"a": 1},', b'{"b": }]'])
        files["good"] = write_lines(folder / "good.jsonl", [text_record(0)])
        specs = [DatasetSpec(name, folder, file) for name, file in files.items()]
        result = audit(specs, encoder(), cache=folder / "cache")
        assert kinds(result) == [("gone", "file", None), ("empty", "file", None), ("array", "json", 2)]
        assert [findings.usable for findings in result.sets] == [0, 0, 0, 1]
        assert [s.spec.name for s in result.opened] == ["good"]

    def test_length(self, check):
        result = check({"a": [text_record(0)]}, a={"length": 3})
        [problem] = result.problems
        assert (problem.kind, problem.line) == ("length", None)
        assert problem.message == "'length' is 3 in the meta file, but there are 1 records"

    def test_fewer_tiles_and_truncated_text(self, check):
        by = encoder(max_seq_length=200, truncate_text=True)
        records = [image_record(0, "wide.png"), text_record(1, answer="a cat " * 100), text_record(2)]
        result = check({"a": records}, by=by)
        [tiles, text] = result.problems
        assert (tiles.kind, tiles.line) == ("fewer tiles", 1)
        assert re.fullmatch(r"\d tiles instead of 5", tiles.message)
        assert (text.kind, text.line) == ("text truncated", 2)
        assert not any(problem.is_error for problem in result.problems)

    def test_without_a_tokenizer(self, check):
        by = RecordEncoder(None, Preprocessing(tile_size=16, max_dynamic_patch=4))
        sets = {"a": [image_record(0, "wide.png"), text_record(1), image_record(2, "no.png"), b"{"]}
        result = check(sets, by=by)
        assert kinds(result) == [("a", "image missing", 3), ("a", "json", 4)]
        assert result.max_seq_length is None
        assert result.sets[0].lengths.tiles.tolist() == [5, 0]
        assert set_statistics(result.sets[0], with_tokens=False)["tokens"] is None
        limited = check({"b": [image_record(0, "wide.png")]}, by=by, b={"max_dynamic_patch": 2})
        assert limited.sets[0].lengths.tiles.tolist() == [3]

    def test_several_workers(self, check, monkeypatch, folder):
        monkeypatch.setattr(build_module, "_CHUNK", 3)
        records = [image_record(i, "wide.png") if i % 3 else text_record(i) for i in range(12)]
        records[4] = records[9] = image_record(4, "cut.jpg")
        specs = [DatasetSpec("a", folder / "images", write_lines(folder / "a.jsonl", records))]
        serial = audit(specs, encoder(), decode=True, workers=1, cache=folder / "one")
        parallel = audit(specs, encoder(), decode=True, workers=2, cache=folder / "two")
        assert serial.problems == parallel.problems
        assert kinds(serial) == [("a", "image unreadable", 5), ("a", "image unreadable", 10)]
        for name, column in serial.sets[0].lengths.columns.items():
            assert np.array_equal(column, parallel.sets[0].lengths.columns[name])


class TestDuplicates:
    def find(self, folder, *sets) -> list[tuple[str, int, str, str]]:
        opened = [write_set(folder, records, f"s{i}") for i, records in enumerate(sets)]
        indexes = index_records(opened, cache=folder / "cache")
        return [(p.dataset, p.line, p.kind, p.message) for p in find_duplicates(opened, indexes)]

    def test_none(self, folder):
        assert self.find(folder, [text_record(0), text_record(1)], [text_record(2)]) == []

    def test_duplicate_ids_within_a_dataset(self, folder):
        a = [text_record(0), text_record(1, id="r0"), text_record(2, id=None), text_record(3, id=None)]
        assert self.find(folder, a, [text_record(5, id="r0")]) == [
            ("s0", 2, "duplicate id", "same id as line 1")
        ]

    def test_duplicate_records_across_datasets(self, folder):
        a, b = [text_record(0), text_record(1)], [text_record(7, id="other"), text_record(1, id="again")]
        assert self.find(folder, a, b) == [
            ("s1", 2, "duplicate record", "same conversation and images as line 2 of dataset s0")
        ]

    def test_duplicate_records_within_a_dataset(self, folder):
        a = [text_record(0, id=str(i)) for i in range(3)]
        assert self.find(folder, a) == [
            ("s0", line, "duplicate record", "same conversation and images as line 1") for line in (2, 3)
        ]

    def test_records_with_different_images_differ(self, folder):
        noise(10, 40).save(folder / "images/tall.png")
        assert self.find(folder, [image_record(0, "wide.png"), image_record(0, "tall.png", id="b")]) == []

    def test_unusable_records_are_not_duplicates(self, folder):
        assert self.find(folder, [image_record(0, "no.png"), image_record(0, "no.png", id="b")]) == []

    def test_against_brute_force(self, folder):
        rng = np.random.default_rng(0)
        sets = [
            [text_record(int(n), id=f"{rng.integers(6)}") for n in rng.integers(8, size=12)] for _ in range(3)
        ]
        seen, expected = {}, []
        for i, records in enumerate(sets):
            ids, of_ids, of_records = {}, [], []
            for line, record in enumerate(records, 1):
                if record["id"] in ids:
                    of_ids.append((f"s{i}", line, "duplicate id", f"same id as line {ids[record['id']]}"))
                ids.setdefault(record["id"], line)
                key = json.dumps(record["conversations"])
                if key in seen:
                    j, first = seen[key]
                    location = f"line {first}" + (f" of dataset s{j}" if j != i else "")
                    of_records.append(
                        (f"s{i}", line, "duplicate record", f"same conversation and images as {location}")
                    )
                seen.setdefault(key, (i, line))
            expected += of_ids + of_records
        assert self.find(folder, *sets) == expected


class TestReport:
    def test_problems(self, check, folder):
        result = check({"a": [text_record(0), text_record(0), {"id": "x"}], "b": [b"\xff", text_record(1)]})
        write_report(folder / "report", result)
        rows = [json.loads(line) for line in (folder / "report" / PROBLEMS).read_text().splitlines()]
        assert [(r["dataset"], r["line"], r["id"], r["kind"], r["severity"]) for r in rows] == [
            ("a", 3, "x", "structure", "error"),
            ("a", 2, "r0", "duplicate id", "warning"),
            ("a", 2, "r0", "duplicate record", "warning"),
            ("b", 1, None, "encoding", "error"),
        ]
        assert {r["file"] for r in rows} == {str(folder / "a.jsonl"), str(folder / "b.jsonl")}
        assert all(set(r) == {"file", "line", "dataset", "id", "kind", "severity", "message"} for r in rows)

    def test_page_is_self_contained_and_escapes_html(self, check, folder):
        nasty = "<script>alert(1)</script>"
        result = check({nasty.replace("/", "-"): [{"id": nasty}, text_record(0)]})
        page = write_report(folder / "report", result)
        text = page.read_text(encoding="utf-8")
        assert page.name == PAGE
        assert "<script" not in text
        assert "&lt;script&gt;alert(1)" in text
        assert not re.search(r"(src|href)=['\"](?!data:)", text)
        assert "<b>1</b>of 2 records can be used" in text

    @pytest.mark.parametrize("by", [None, RecordEncoder(None, Preprocessing())])
    def test_without_usable_records(self, check, folder, by):
        result = check({"a": [b"{"]}, by=by)
        assert write_report(folder / "report", result).is_file()

    def test_statistics(self, check):
        answers = ["a" + " cat" * n for n in range(101)]
        result = check({"a": [text_record(0, answer=answer, id=answer) for answer in answers]})
        statistics = set_statistics(result.sets[0], with_tokens=True)
        tokens = sorted(result.sets[0].lengths.tokens.tolist())
        assert [statistics[f"tokens_{name}"] for name in ("5", "50", "95", "most")] == [
            tokens[5], tokens[50], tokens[95], tokens[100]
        ]  # fmt: skip
        assert statistics["tokens"] == sum(tokens)
        assert statistics["supervised"] == sum(result.sets[0].lengths.supervised.tolist())
        assert set_rows(result)[0][:4] == ("a", "101", "101", "0")

    def test_errors_are_listed_first(self, check):
        result = check({"a": [text_record(0), text_record(0), b"{"]})
        assert list(group_by_kind(result.problems)) == ["json", "duplicate id", "duplicate record"]


class TestCache:
    @pytest.fixture
    def examined(self, monkeypatch):
        indices, examine = [], RecordSet.check

        def counted(self, index, *, decode=False):
            indices.append((index, decode))
            return examine(self, index, decode=decode)

        monkeypatch.setattr(RecordSet, "check", counted)
        return indices

    def test_second_audit_examines_only_records_with_problems(self, check, examined):
        sets = {"a": [text_record(0), text_record(0), {"id": "x"}, text_record(3)]}
        first = check(sets)
        examined.clear()
        second = check(sets)
        assert examined == [(2, False)]
        assert second.problems == first.problems
        assert second.sets[0].lengths.tokens.tolist() == first.sets[0].lengths.tokens.tolist()

    def test_fast_results_are_not_reused_for_decoding(self, check, examined):
        sets = {"a": [image_record(0, "wide.png")]}
        check(sets)
        check(sets, decode=True)
        assert examined == [(0, False), (0, True)]
        check(sets)
        check(sets, decode=True)
        assert len(examined) == 2

    def test_problems_are_examined_as_thoroughly_as_before(self, check, examined):
        sets = {"a": [image_record(0, "cut.jpg")]}
        check(sets, decode=True)
        check(sets)
        assert examined == [(0, True), (0, True)]

    def test_truncation_is_cached_separately(self, check):
        sets = {"a": [text_record(0, answer="a cat " * 300)]}
        assert kinds(check(sets)) == [("a", "too long", 1)]
        assert kinds(check(sets, by=encoder(truncate_text=True))) == [("a", "text truncated", 1)]
        assert kinds(check(sets)) == [("a", "too long", 1)]


# Record 0 has no image. The others have two of six images each, and each image is in two records.
WITH_IMAGES = {"a": [text_record(9), *(image_record(i, f"{i}.png", f"{(i + 1) % 6}.png") for i in range(6))]}


class TestChangedImages:
    """A record's cached results are valid until one of its images changes."""

    @pytest.fixture(autouse=True)
    def _images(self, folder):
        for i in range(6):
            noise(40 + i, 20, seed=i).save(folder / f"images/{i}.png")

    @pytest.fixture
    def examined(self, monkeypatch):
        indices, examine = [], RecordSet.check
        monkeypatch.setattr(
            RecordSet,
            "check",
            lambda self, i, **options: (indices.append(i), examine(self, i, **options))[1],
        )
        return indices

    @pytest.mark.parametrize("decode", [False, True])
    def test_only_records_with_changed_images_are_examined(self, check, folder, examined, decode):
        assert check(WITH_IMAGES, decode=decode).problems == []
        (folder / "images/2.png").unlink()
        cut = folder / "images/5.png"
        cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 2 // 3])
        examined.clear()
        result = check(WITH_IMAGES, decode=decode)
        assert kinds(result) == [("a", "image missing", 3), ("a", "image missing", 4),
                                ("a", "image unreadable", 6), ("a", "image unreadable", 7)]  # fmt: skip
        assert examined == [2, 3, 5, 6]
        assert result.sets[0].usable == 3

    def test_restored_image(self, check, folder, examined):
        check(WITH_IMAGES)
        content = (folder / "images/2.png").read_bytes()
        (folder / "images/2.png").unlink()
        assert check(WITH_IMAGES).sets[0].usable == 5
        (folder / "images/2.png").write_bytes(content)
        assert check(WITH_IMAGES).problems == []
        examined.clear()
        assert check(WITH_IMAGES).problems == []
        assert examined == []

    def test_replaced_image_is_indexed_again(self, check, folder, examined):
        before = check(WITH_IMAGES).sets[0].lengths
        noise(16, 16).save(folder / "images/0.png")
        examined.clear()
        result = check(WITH_IMAGES)
        assert examined == [1, 6]
        records = result.opened[0]
        for i in range(7):
            assert result.sets[0].lengths[i] == records.encode(i)[1].lengths
        assert result.sets[0].lengths.tiles.tolist() != before.tiles.tolist()
        examined.clear()
        check(WITH_IMAGES)
        assert examined == []

    def test_new_modification_time_is_a_change(self, check, folder, examined):
        """Damage may leave the file size unchanged."""
        check(WITH_IMAGES, decode=True)
        break_inside(folder / "images/4.png")
        status = (folder / "images/4.png").stat()
        os.utime(folder / "images/4.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert kinds(check(WITH_IMAGES, decode=True)) == [
            ("a", "image unreadable", 5),
            ("a", "image unreadable", 6),
        ]

    def test_only_new_images_are_decoded(self, check, folder, examined, monkeypatch):
        decoded, decode = [], images_module.decode_image
        monkeypatch.setattr(
            images_module, "decode_image", lambda path: (decoded.append(path.name), decode(path))[1]
        )
        check(WITH_IMAGES, decode=True)
        assert sorted(decoded) == [f"{i}.png" for i in range(6)]
        noise(33, 33).save(folder / "images/3.png")
        decoded.clear()
        assert check(WITH_IMAGES, decode=True).problems == []
        assert decoded == ["3.png"]

    def test_several_workers_share_the_cache(self, folder, examined, monkeypatch):
        monkeypatch.setattr(build_module, "_CHUNK", 2)
        specs = [DatasetSpec("a", folder / "images", write_lines(folder / "a.jsonl", WITH_IMAGES["a"]))]
        audit(specs, encoder(), workers=2, cache=folder / "cache")
        assert examined == []
        (folder / "images/0.png").unlink()
        result = audit(specs, encoder(), workers=1, cache=folder / "cache")
        assert examined == [1, 6]
        assert kinds(result) == [("a", "image missing", 2), ("a", "image missing", 7)]
