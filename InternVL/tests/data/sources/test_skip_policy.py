"""Unusable records: rejected with an error, or excluded without changing the others."""

import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_sets import encoder, image_record, noise, text_record, write_set

from internvl_chat.data.batching.collator import DUMMY_KEY, PackDataset, pack_samples
from internvl_chat.data.dataset import SampleIndex, TrainingData
from internvl_chat.data.index.build import index_records
from internvl_chat.data.record_set import RecordKey
from internvl_chat.data.sources.problems import (
    ERRORS,
    KINDS,
    WARNINGS,
    Problem,
    printable_id,
    printable_message,
)
from internvl_chat.data.sources.skip_policy import (
    ExcludedRecord,
    SkippedRecord,
    exclude_records,
    raise_problems,
)
from internvl_chat.utils.errors import DataError

BAD = {
    "json": b'{"id": "b", "conversations": [',
    "encoding": b'{"id": "b\xff"}',
    "structure": b"[1]",
    "role": {"id": "b", "conversations": [{"from": "robot", "value": "?"}]},
    "empty answer": text_record(1, answer=" \n", id="b"),
    "placeholders": text_record(1, id="b", image=["wide.png", "wide.png"]),
    "image missing": image_record(1, "wide.png", "nowhere.png", id="b"),
    "image outside root": image_record(1, "../wide.png", id="b"),
    "image unreadable": image_record(1, "text.png", id="b"),
    "too long": text_record(1, answer="a cat " * 500, id="b"),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    noise(40, 10).save(tmp_path / "images/wide.png")
    (tmp_path / "images/text.png").write_text("no image")
    return tmp_path


def open_data(sets, cache, **options) -> TrainingData:
    """Open datasets like training with `--on_bad_record skip`."""
    indexes = index_records(sets, cache=cache)
    problems = [problem for index in indexes for problem in index.problems]
    lengths = [index.lengths for index in indexes]
    excluded = exclude_records(problems, sum(map(len, indexes)), 1.0)
    return TrainingData(sets, lengths=lengths, excluded=excluded, max_bad_fraction=0.5, **options)


class TestKinds:
    @pytest.mark.parametrize("kind", BAD)
    def test_kind_of_each_problem(self, folder, kind):
        records = write_set(folder, [text_record(0), BAD[kind]])
        [index] = index_records([records], cache=folder / "cache")
        [problem] = index.problems
        assert problem.kind == kind
        assert (problem.dataset, problem.index, problem.line) == ("qa", 1, 2)
        assert problem.file == records.spec.annotation
        assert problem.id == ("b" if isinstance(BAD[kind], dict) else None)
        assert index.unusable == [1]
        assert index.lengths[1] == (0, 0, 0, 0, 0)
        for function in (records.check, records.measure, records.encode, records.load):
            with pytest.raises(DataError) as caught:
                function(1)
            assert (caught.value.kind, caught.value.message) == (kind, problem.message)

    def test_all_kinds_are_explained(self):
        assert set(BAD) < set(ERRORS)
        assert not set(ERRORS) & set(WARNINGS)
        for kind, meaning in KINDS.items():
            assert kind == kind.lower()
            assert meaning.endswith(".")

    def test_kind_survives_pickling(self):
        error = DataError("m", file="f", line=3, record="r", kind="role")
        assert pickle.loads(pickle.dumps(error)).kind == "role"

    def test_some_empty_answers_are_a_warning(self, folder):
        messages = [*text_record(0)["conversations"], *text_record(1, answer="")["conversations"]]
        records = write_set(folder, [{"id": "x", "conversations": messages}])
        [index] = index_records([records], cache=folder / "cache")
        [problem] = index.problems
        assert (problem.kind, problem.is_error, index.unusable) == ("empty message", False, [])
        assert problem.message == "empty answer in message 4"

    @pytest.mark.parametrize(
        ("roles", "message"),
        [
            ("ah", "the first message is an answer"),
            ("hah", "the last question has no answer and is not trained on"),
            ("hha", "two consecutive questions"),
            ("haa", "two consecutive answers"),
            ("sahha", "the first message is an answer"),
            ("sha", None),
            ("haha", None),
        ],
    )
    def test_messages_out_of_order_are_a_warning(self, folder, roles, message):
        names = {"s": "system", "h": "human", "a": "gpt"}
        messages = [{"from": names[role], "value": "text"} for role in roles]
        [index] = index_records([write_set(folder, [{"conversations": messages}])], cache=folder / "cache")
        assert index.unusable == []
        assert {problem.kind for problem in index.problems} == ({"message order"} if message else set())
        assert message is None or message in {problem.message for problem in index.problems}

    def test_placeholder_in_an_answer_is_a_warning(self, folder):
        messages = text_record(0, answer="See <image>.")["conversations"]
        [index] = index_records([write_set(folder, [{"conversations": messages}])], cache=folder / "cache")
        [problem] = index.problems
        assert (problem.kind, problem.message) == (
            "placeholder in answer", "<image> in the answer in message 2 is treated as text"
        )  # fmt: skip


class TestMessages:
    def test_control_characters(self):
        assert printable_message("\x1b[2J\n\ud800 中") == "\\x1b[2J\\n\\ud800 中"
        assert printable_id("\u202e") == "\\u202e"
        assert len(printable_message("x" * 10**6)) < 700
        assert printable_message("a" * 10**6 + "end").endswith("end")

    def test_ids_of_other_types(self):
        deep: list = []
        for _ in range(100_000):
            deep = [deep]
        assert printable_id(deep) == "(nested too deeply)"
        assert printable_id(None) is None
        assert printable_id(12) == "12"


class TestPolicy:
    def problems(self, count: int) -> list[Problem]:
        return [Problem("qa", i, "f.jsonl", i + 1, f"r{i}", "role", f"bad {i}") for i in range(count)]

    def test_fail_with_one_problem(self):
        with pytest.raises(DataError) as caught:
            raise_problems(self.problems(1))
        assert str(caught.value) == "f.jsonl, line 1 (record 'r0'): bad 0"

    def test_fail_with_many_problems(self):
        with pytest.raises(DataError) as caught:
            raise_problems(self.problems(50))
        lines = str(caught.value).splitlines()
        assert lines[0] == "50 records cannot be used:"
        assert lines[1] == "  1. f.jsonl, line 1 (record 'r0'): bad 0"
        assert lines[21:] == ["  ... and 30 more"]

    def test_warnings_do_not_fail(self):
        warning = self.problems(1)[0]._replace(kind="duplicate id")
        raise_problems([warning])
        assert exclude_records([warning], 1, 0.0) == []

    @pytest.mark.parametrize(("bad", "total", "most", "allowed"), [
        (1, 100, 0.01, True), (2, 100, 0.01, False), (0, 5, 0.0, True), (1, 9, 0.0, False), (5, 5, 1.0, True),
    ])  # fmt: skip
    def test_max_fraction(self, bad, total, most, allowed):
        problems = self.problems(bad)
        if allowed:
            assert exclude_records(problems, total, most) == [
                ExcludedRecord("qa", i, str(problems[i])) for i in range(bad)
            ]
            return
        with pytest.raises(DataError) as caught:
            exclude_records(problems, total, most)
        message = str(caught.value)
        assert message.startswith(f"{bad} of {total} records cannot be used ({bad / total:.2%}), more than "
                                  f"--max_bad_fraction {most:g} allows:")  # fmt: skip
        assert "(record 'r0'): bad 0" in message
        assert "raise --max_bad_fraction" in message


class TestOrder:
    def test_others_keep_their_order(self, folder):
        records = [
            text_record(0),
            BAD["image missing"],
            image_record(2, "wide.png"),
            BAD["json"],
            text_record(4),
        ]
        sets = [write_set(folder, records, "a", repeat_time=2), write_set(folder, records[::-1], "b")]
        data = open_data(sets, folder / "cache")
        assert data.sizes == [6, 3]
        ids = [data[SampleIndex(i, 0)][0].id for i in range(len(data))]
        assert ids == ["r0", "r2", "r4"] * 2 + ["r4", "r2", "r0"]
        assert [(out.dataset, out.index) for out in data.excluded] == [("a", 1), ("a", 3), ("b", 1), ("b", 3)]
        assert all(out.message for out in data.excluded)

    def test_record_with_a_missing_image_is_excluded(self, folder):
        noise(10, 40, seed=1).save(folder / "images/tall.png")
        names = [("wide.png", "tall.png"), ("nowhere.png", "wide.png", "tall.png"), ("tall.png", "wide.png")]
        records = [image_record(number, *images) for number, images in enumerate(names)]
        data = open_data([write_set(folder, records)], folder / "cache")
        samples = [data[SampleIndex(i, 0)][0] for i in range(len(data))]
        assert [sample.id for sample in samples] == ["r0", "r2"]
        first, second = (sample.tiles[[2, 5]] for sample in samples)
        assert torch.equal(first, second.flip(0))
        assert not torch.equal(first[0], first[1])

    @settings(max_examples=60)
    @given(
        sets=st.lists(
            st.tuples(st.lists(st.sampled_from(["good", *BAD]), min_size=1, max_size=8),
                      st.sampled_from([0.5, 1, 2])),
            min_size=1, max_size=3,
        )
    )  # fmt: skip
    def test_used_records_are_those_of_the_file_without_bad_ones(self, tmp_path_factory, sets):
        folder = tmp_path_factory.mktemp("any")
        (folder / "images").mkdir()
        noise(40, 10).save(folder / "images/wide.png")
        (folder / "images/text.png").write_text("no image")
        opened, expected = [], []
        for number, (kinds, repeat) in enumerate(sets):
            lines = [text_record(i) if kind == "good" else BAD[kind] for i, kind in enumerate(kinds)]
            opened.append(write_set(folder, lines, f"s{number}", repeat_time=repeat))
            used = kinds[: int(len(kinds) * repeat)]
            good = [RecordKey(f"s{number}", i) for i, kind in enumerate(used) if kind == "good"]
            expected += good * max(1, int(repeat))
        if not expected:
            with pytest.raises(DataError, match="no records left"):
                open_data(opened, folder / "cache")
            return
        data = open_data(opened, folder / "cache")
        assert [data[SampleIndex(i, 0)][0].key for i in range(len(data))] == expected
        epoch = data.epoch_lengths()
        assert len(epoch) == len(expected)
        assert [epoch[i] for i in range(len(epoch))] == [
            data[SampleIndex(i, 0)][0].encoded.lengths for i in range(len(data))
        ]

    def test_no_records_left(self, folder):
        with pytest.raises(DataError, match="all records are excluded"):
            open_data([write_set(folder, [BAD["role"]])], folder / "cache")


class TestPacks:
    @pytest.fixture
    def data(self, folder):
        noise(10, 40, seed=1).save(folder / "images/goes.png")
        records = [text_record(0), image_record(1, "goes.png"), image_record(2, "wide.png")]
        data = open_data([write_set(folder, records)], folder / "cache")
        (folder / "images/goes.png").unlink()
        return data

    def test_missing_record_is_listed_as_skipped(self, data):
        pack = PackDataset(data)[[SampleIndex(0, 0), SampleIndex(1, 0), SampleIndex(2, 0)]]
        assert [key.index for key in pack.keys] == [0, 2]
        [skipped] = pack.skipped
        assert skipped == SkippedRecord("qa", 1, "r1", skipped.message)
        assert "goes.png does not exist" in skipped.message

    def test_other_records_are_unaffected(self, data):
        pack, expected = (
            PackDataset(data)[[SampleIndex(0, 0), SampleIndex(1, 0), SampleIndex(2, 0)]],
            PackDataset(data)[[SampleIndex(0, 0), SampleIndex(2, 0)]],
        )
        assert expected.skipped == ()
        for name, value in vars(expected).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(pack, name))

    def test_pack_without_records_contains_a_dummy_sample(self, data):
        pack = PackDataset(data)[[SampleIndex(1, 0)]]
        assert (pack.keys, pack.counts.tolist(), pack.supervised.tolist()) == ((DUMMY_KEY,), [False], [1])
        assert pack.input_ids.shape == (1, 2)
        assert (pack.num_tokens, pack.num_supervised, len(pack.tiles)) == (0, 0, 0)
        assert [skipped.index for skipped in pack.skipped] == [1]
        assert pack.tiles.shape == PackDataset(data)[[SampleIndex(0, 0)]].tiles.shape
        assert len(PackDataset(data, multiple=8)[[SampleIndex(1, 0)]].input_ids[0]) == 8

    def test_dummy_sample_is_not_skipped(self, data):
        assert PackDataset(data)[[SampleIndex(1, 0, counts=False)]].skipped == ()

    def test_pack_can_be_pickled(self, data):
        pack = PackDataset(data)[[SampleIndex(0, 0), SampleIndex(1, 0)]]
        assert pickle.loads(pickle.dumps(pack)).skipped == pack.skipped

    def test_error_without_the_policy(self, data):
        data.max_bad_fraction = None
        error = PackDataset(data)[[SampleIndex(0, 0), SampleIndex(1, 0), SampleIndex(2, 0)]]
        assert isinstance(error, DataError)
        assert (error.record, error.kind) == ("r1", "image missing")

    def test_changed_image_is_skipped(self, data, folder):
        noise(10, 10).save(folder / "images/goes.png")
        [skipped] = PackDataset(data)[[SampleIndex(1, 0)]].skipped
        assert "an image has changed since" in skipped.message


def test_dummy_is_the_shortest_conversation():
    dummy = encoder().dummy()
    assert dummy.lengths == (2, 1, 0, 0, 0)
    assert dummy.labels[0] < 0
    assert dummy.input_ids.dtype == dummy.labels.dtype == torch.int64


def test_lengths_of_the_used_records(folder):
    lines = [text_record(i, answer="a cat " * (i + 1)) for i in range(6)]
    lines[2] = BAD["role"]
    data = open_data([write_set(folder, lines)], folder / "cache")
    assert all(a < b for a, b in pairwise(data.epoch_lengths().tokens.tolist()))
    assert np.all(data.lengths[0].tokens[[2]] == 0)
    packed = pack_samples([data[SampleIndex(i, 0)] for i in range(len(data))])
    assert packed.lengths.tolist() == data.epoch_lengths().tokens.tolist()
