"""The length index: it matches the lengths of encoded records and is cached until something changes."""

import json
import logging
import os
import tarfile
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import Qwen2Tokenizer

from internvl_chat.data.dataset import build_sets
from internvl_chat.data.encode.encoder import RecordEncoder, RecordLengths
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer import load_tokenizer
from internvl_chat.data.encode.tokenizer_training import train_tokenizer
from internvl_chat.data.index import build as build_module
from internvl_chat.data.index.build import index_records, tokenizer_digest
from internvl_chat.data.index.cache import Lengths
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.meta import DatasetSpec, load_meta
from internvl_chat.data.sources.skip_policy import raise_problems
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.paths import default_cache


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["what is this ? a cat on a mat"] * 20, 300)


@pytest.fixture(autouse=True)
def _warnings_are_seen(monkeypatch):
    monkeypatch.setattr(logging.getLogger("internvl_chat"), "propagate", True)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def make(tmp_path, tokenizer):
    """Write records and an image, and open them as a dataset."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 10)).save(tmp_path / "images" / "wide.png")

    def make(records, name="qa", tokenizer=tokenizer, repeat_time=1, **options) -> RecordSet:
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return reopen(file, name, tokenizer, repeat_time, **options)

    def reopen(file, name="qa", tokenizer=tokenizer, repeat_time=1, root=tmp_path / "images", **options):
        small = {"tile_size": 16, "tokens_per_tile": 3, "max_dynamic_patch": 4, "max_seq_length": 400}
        encoder = RecordEncoder(tokenizer, Preprocessing(**{**small, **options}))
        return RecordSet(DatasetSpec(name, root, file, repeat_time=repeat_time), encoder)

    make.reopen = reopen
    return make


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """Return a list to which this process adds the index of each record that it checks."""
    indices, check = [], RecordSet.check
    monkeypatch.setattr(
        RecordSet, "check", lambda self, i, **options: (indices.append(i), check(self, i, **options))[1]
    )
    return indices


def index_lengths(sets: list[RecordSet], **options) -> list[Lengths]:
    """Index datasets and raise their problems, like training with `--on_bad_record fail`."""
    indexes = index_records(sets, **options)
    raise_problems([problem for index in indexes for problem in index.problems])
    return [index.lengths for index in indexes]


def record(number: int, **extra) -> dict:
    answer = "a" + " cat" * number
    messages = [{"from": "human", "value": f"what is {number} ?"}, {"from": "gpt", "value": answer}]
    return {"id": f"r{number}", "conversations": messages, **extra}


def encoded(records: RecordSet) -> list[tuple[int, ...]]:
    return [tuple(records.encode(i)[1].lengths) for i in range(records.num_distinct)]


def rows(lengths: Lengths) -> list[tuple[int, ...]]:
    return [tuple(lengths[i]) for i in range(len(lengths))]


class TestLengths:
    @pytest.mark.parametrize("most", [1, 6, 12])
    @pytest.mark.parametrize("longest", [8192, 600])
    def test_sample_data(self, sample_data, cache, most, longest):
        options = {
            "tile_size": 112,
            "tokens_per_tile": 16,
            "max_dynamic_patch": most,
            "max_seq_length": longest,
        }
        encoder = RecordEncoder(train_tokenizer(["the panel"], 600), Preprocessing(**options))
        sets = build_sets(load_meta(sample_data / "train.json", "/"), encoder)
        for records, lengths in zip(sets, index_lengths(sets, cache=cache), strict=True):
            assert rows(lengths) == encoded(records)
            assert {a.dtype for a in lengths.columns.values()} == {np.dtype(np.int32)}

    @pytest.mark.parametrize("most", [1, 6, 12])
    def test_real_records(self, shared, internvl3_tokenizer, cache, most):
        specs = [
            DatasetSpec(file.stem, shared / "pmc_mi/images", file)
            for file in sorted((shared / "pmc_mi/jsonl").glob("*.jsonl"))
        ]
        limited = 0
        for longest in (8192, 2400):
            encoder = RecordEncoder(
                internvl3_tokenizer, Preprocessing(max_dynamic_patch=most, max_seq_length=longest)
            )
            sets = build_sets(specs, encoder)
            for records, lengths in zip(sets, index_lengths(sets, cache=cache), strict=True):
                assert rows(lengths) == encoded(records)
                limited += int((lengths.tiles_lost > 0).sum())
        assert (limited > 0) == (most > 1)

    def test_only_records_used_in_an_epoch(self, make, cache):
        records = [record(i, image="wide.png") for i in range(5)]
        sets = [make(records, "part", repeat_time=0.5), make(records, "twice", repeat_time=2)]
        sets += [make(records, "none", repeat_time=0.1)]
        all_lengths = index_lengths(sets, cache=cache)
        assert [len(lengths) for lengths in all_lengths] == [2, 5, 0]
        assert [rows(lengths) for lengths in all_lengths] == [encoded(s) for s in sets]
        assert len(list(cache.iterdir())) == 3
        assert [rows(lengths) for lengths in index_lengths(sets, cache=cache)] == [encoded(s) for s in sets]

    def test_several_workers(self, make, cache, monkeypatch, measured):
        monkeypatch.setattr(build_module, "_CHUNK", 7)
        sets = [
            make([record(i, image="wide.png") for i in range(30)], "a"),
            make([record(0)], "none", repeat_time=0.5),
            make([record(i) for i in range(20)], "b", max_seq_length=60),
        ]
        single = problem_of(sets, cache, workers=1)
        measured.clear()
        parallel = problem_of(sets, cache / "other", workers=2)
        assert not measured
        assert parallel == single
        assert "records cannot be used" in single
        for folder in (cache, cache / "other"):
            assert rows(index_lengths(sets[:1], cache=folder)[0]) == encoded(sets[0])
        assert not measured

    def test_worker_that_dies(self, make, cache, monkeypatch):
        class Broken:
            def __init__(self, workers, **options):
                self.ended = False

            def map(self, function, chunks):
                yield build_module._check_records([records], next(iter(chunks)))
                raise BrokenProcessPool("killed")

            def shutdown(self, cancel_futures):
                self.ended = cancel_futures
                ended.append(self)

        ended = []
        monkeypatch.setattr(build_module, "_CHUNK", 1)
        monkeypatch.setattr(build_module, "ProcessPoolExecutor", Broken)
        records = make([record(0), record(1)])
        assert "out of memory" in problem_of([records], cache, workers=2)
        assert [pool.ended for pool in ended] == [True]
        assert not cache.exists()

    def test_slow_tokenizer(self, make, cache, tokenizer, monkeypatch):
        records = make([record(i, image="wide.png") for i in range(3)])
        fast = rows(index_lengths([records], cache=cache)[0])
        monkeypatch.setattr(Qwen2Tokenizer, "is_fast", False)
        assert rows(index_lengths([make.reopen(records.spec.annotation)], cache=cache)[0]) == fast


def problem_of(sets: list[RecordSet], cache: Path, **options) -> str:
    with pytest.raises(DataError) as caught:
        index_lengths(sets, cache=cache, **options)
    return str(caught.value)


@pytest.fixture(scope="module")
def internvl3_tokenizer(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    with tarfile.open(shared / "internvl3_tokenizer.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return load_tokenizer(folder / "internvl3_tokenizer")[0]


class TestProblems:
    FAULTY = (
        {"id": "malformed", "conversations": []},
        record(1, id="missing", image="nowhere.png"),
        record(1, id="two", image=["wide.png", "wide.png"]),
        record(400, id="long"),
        {"id": "reserved", "conversations": [{"from": "gpt", "value": "<IMG_CONTEXT>"}]},
        [1],
    )  # fmt: skip

    def test_single_problem_is_raised(self, make, cache):
        records = make([record(0), self.FAULTY[1]])
        with pytest.raises(DataError, match="does not exist") as caught:
            index_lengths([records], cache=cache)
        error = caught.value
        assert (error.file, error.line, error.record) == (records.spec.annotation, 2, "missing")

    def test_several_problems_are_listed_with_the_messages_of_encode(self, make, cache):
        sets = [make([record(0), *self.FAULTY], "a"), make([record(0)], "good"), make(self.FAULTY[:1], "b")]
        messages = []
        for records in sets:
            for index in range(len(records)):
                try:
                    records.encode(index)
                except DataError as error:
                    messages.append(str(error))
        listed = [f"  {i}. {message}" for i, message in enumerate(messages, 1)]
        assert len(messages) == 7
        assert problem_of(sets, cache) == "\n".join(["7 records cannot be used:", *listed])

    def test_only_the_first_problems_are_listed(self, make, cache, monkeypatch):
        monkeypatch.setattr(build_module, "_CHUNK", 15)
        records = make([self.FAULTY[1]] * 50)
        message = problem_of([records], cache).splitlines()
        assert message[0] == "50 records cannot be used:"
        assert [f"line {i} " in line for i, line in enumerate(message[1:21], 1)] == [True] * 20
        assert message[21:] == ["  ... and 30 more"]

    def test_only_unusable_records_are_checked_again(self, make, cache, measured):
        sets = [make([record(0), self.FAULTY[1]], "bad"), make([record(0)], "good")]
        problem_of(sets, cache)
        assert len(list(cache.iterdir())) == 2
        measured.clear()
        problem_of(sets, cache)
        assert measured == [1]

    def test_repaired_image(self, make, cache, measured, tmp_path):
        records = make([record(0), self.FAULTY[1], record(2)])
        problem_of([records], cache)
        Image.new("RGB", (10, 10)).save(tmp_path / "images/nowhere.png")
        assert rows(index_lengths([records], cache=cache)[0]) == encoded(records)
        measured.clear()
        assert rows(index_lengths([records], cache=cache)[0]) == encoded(records)
        assert measured == []


class TestCache:
    def test_second_run_checks_nothing(self, make, cache, measured):
        records = make([record(i, image="wide.png") for i in range(3)])
        first = index_lengths([records], cache=cache)[0]
        assert measured == [0, 1, 2]
        second = index_lengths([make.reopen(records.spec.annotation)], cache=cache)[0]
        assert measured == [0, 1, 2]
        assert rows(first) == rows(second)
        assert first.file == second.file
        assert [first.file] == list(cache.iterdir())

    def test_calls_of_the_tokenizer_do_not_affect_the_key(self, make, cache, tokenizer):
        records = make([record(0)])
        before = index_lengths([records], cache=cache)[0].file
        tokenizer(["a", "a cat"], padding=True, truncation=True, max_length=1)
        assert index_lengths([records], cache=cache)[0].file == before

    @pytest.mark.parametrize(
        "options",
        [
            {"max_dynamic_patch": 6},
            {"max_seq_length": 401},
            {"system_text": "s"},
            {"use_thumbnail": False},
            {"repeat_time": 0.5},
            {"root": "elsewhere"},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_changed_option(self, make, cache, measured, tmp_path, options):
        records = make([record(i, image="wide.png") for i in range(3)])
        index_lengths([records], cache=cache)
        if "root" in options:
            options = {"root": (tmp_path / "images").rename(tmp_path / "elsewhere")}
        measured.clear()
        changed = make.reopen(records.spec.annotation, **options)
        assert rows(index_lengths([changed], cache=cache)[0]) == encoded(changed)
        assert len(measured) == changed.num_distinct

    def test_changed_annotation(self, make, cache, measured):
        records = make([record(1), record(2)])
        before = rows(index_lengths([records], cache=cache)[0])
        changed = make([record(2), record(1)])  # the same size
        status = changed.spec.annotation.stat()
        os.utime(changed.spec.annotation, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        measured.clear()
        assert rows(index_lengths([changed], cache=cache)[0]) == before[::-1]
        assert measured == [0, 1]

    def test_changed_tokenizer(self, make, cache, measured):
        records = make([record(1), record(2)])
        index_lengths([records], cache=cache)
        measured.clear()
        other = make.reopen(records.spec.annotation, tokenizer=train_tokenizer([], 256))
        assert rows(index_lengths([other], cache=cache)[0]) == encoded(other)
        assert measured == [0, 1]

    @pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "other records", "other columns"])
    def test_damaged_cache_is_rebuilt(self, make, cache, measured, caplog, damage):
        records = make([record(i) for i in range(3)])
        file = index_lengths([records], cache=cache)[0].file
        content, columns = file.read_bytes(), np.zeros(2, np.int32)
        if damage == "other records":
            with np.load(file) as stored:
                np.savez(file, **{**stored, **dict.fromkeys(RecordLengths._fields, columns)})
        elif damage == "other columns":
            np.savez(file, tokens=columns)
        else:
            middle = content.index(b"NUMPY") + 130
            flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            file.write_bytes({"truncated": content[:-40], "changed": flipped, "empty": b""}[damage])
        measured.clear()
        assert rows(index_lengths([records], cache=cache)[0]) == encoded(records)
        assert measured == [0, 1, 2]
        assert "recomputing it" in caplog.text
        index_lengths([records], cache=cache)
        assert measured == [0, 1, 2]

    def test_folder_that_is_not_writable(self, make, cache, caplog):
        cache.write_text("a file")
        records = make([record(0)])
        lengths = index_lengths([records], cache=cache)[0]
        assert rows(lengths) == encoded(records)
        assert lengths.file is None
        assert "cannot write the length cache" in caplog.text

    def test_failed_write_leaves_no_file(self, make, cache, monkeypatch):
        def fail(stream, **columns):
            stream.write(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(np, "savez", fail)
        assert index_lengths([make([record(0)])], cache=cache)[0].file is None
        assert list(cache.iterdir()) == []

    def test_default_folder(self, make, monkeypatch, tmp_path):
        home = tmp_path / "home"
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.delenv("M3LLM_CACHE", raising=False)
        assert default_cache() == home / ".cache/m3llm"
        monkeypatch.setenv("XDG_CACHE_HOME", str(home / "x"))
        assert default_cache() == home / "x/m3llm"
        monkeypatch.setenv("M3LLM_CACHE", "~/own")
        assert default_cache() == home / "own"
        assert index_lengths([make([record(0)])])[0].file.parent == home / "own"


def test_tokenizer_digest(tokenizer, monkeypatch):
    same = train_tokenizer(["what is this ? a cat on a mat"] * 20, 300)
    other = train_tokenizer(["what is this ? a cat on a mat"] * 20, 300)
    other.add_tokens(["more"], special_tokens=True)
    for fast in (True, False):
        monkeypatch.setattr(Qwen2Tokenizer, "is_fast", fast)
        assert tokenizer_digest(tokenizer) == tokenizer_digest(same)
        assert tokenizer_digest(tokenizer) != tokenizer_digest(other)
