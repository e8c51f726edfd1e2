"""Records that cannot be used: named and refused, or left out so that nothing else shifts."""

import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_sets import encoder, image_record, noise, text_record, write_set

from internvl_chat.data.batching.collator import FILLER_KEY, PackDataset, pack_samples
from internvl_chat.data.dataset import SampleIndex, TrainingData
from internvl_chat.data.index.build import index_records
from internvl_chat.data.record_set import RecordKey
from internvl_chat.data.sources.problems import ERRORS, KINDS, WARNINGS, Problem, show_id, show_message
from internvl_chat.data.sources.skip_policy import ExcludedRecord, Skipped, exclude_records, raise_problems
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
    """Open sets as training with `--on_bad_record skip` does."""
    indexes = index_records(sets, cache=cache)
    problems = [problem for index in indexes for problem in index.problems]
    lengths = [index.lengths for index in indexes]
    excluded = exclude_records(problems, sum(map(len, indexes)), 1.0)
    return TrainingData(sets, lengths=lengths, excluded=excluded, max_bad_fraction=0.5, **options)


class TestKinds:
    @pytest.mark.parametrize("kind", BAD)
    def test_of_each_problem(self, folder, kind):
        records = write_set(folder, [text_record(0), BAD[kind]])
        [index] = index_records([records], cache=folder / "cache")
        [problem] = index.problems
        assert problem.kind == kind
        assert (problem.dataset, problem.index, problem.line) == ("qa", 1, 2)
        assert problem.file == records.spec.annotation
        assert problem.id == ("b" if isinstance(BAD[kind], dict) else None)
        assert index.unusable == [1]
        assert index.lengths[1] == (0, 0, 0, 0, 0)
        for look in (records.examine, records.measure, records.encode, records.load):
            with pytest.raises(DataError) as caught:
                look(1)
            assert (caught.value.kind, caught.value.message) == (kind, problem.message)

    def test_are_explained(self):
        assert set(BAD) < set(ERRORS)
        assert not set(ERRORS) & set(WARNINGS)
        for kind, meaning in KINDS.items():
            assert kind == kind.lower()
            assert meaning.endswith(".")

    def test_cross_processes(self):
        error = DataError("m", file="f", line=3, record="r", kind="role")
        assert pickle.loads(pickle.dumps(error)).kind == "role"

    def test_one_empty_answer_of_several_is_a_warning(self, folder):
        messages = [*text_record(0)["conversations"], *text_record(1, answer="")["conversations"]]
        records = write_set(folder, [{"id": "x", "conversations": messages}])
        [index] = index_records([records], cache=folder / "cache")
        [problem] = index.problems
        assert (problem.kind, problem.is_error, index.unusable) == ("empty message", False, [])
        assert problem.message == "empty answer in message 4"

    @pytest.mark.parametrize(
        ("roles", "message"),
        [
            ("ah", "an answer comes first, without a question"),
            ("hah", "the last question has no answer; nothing is learnt from it"),
            ("hha", "a question follows a question, with nothing between"),
            ("haa", "an answer follows an answer, with nothing between"),
            ("sahha", "an answer comes first, without a question"),
            ("sha", None),
            ("haha", None),
        ],
    )
    def test_turns_out_of_order_are_a_warning(self, folder, roles, message):
        names = {"s": "system", "h": "human", "a": "gpt"}
        messages = [{"from": names[role], "value": "text"} for role in roles]
        [index] = index_records([write_set(folder, [{"conversations": messages}])], cache=folder / "cache")
        assert index.unusable == []
        assert {problem.kind for problem in index.problems} == ({"message order"} if message else set())
        assert message is None or message in {problem.message for problem in index.problems}

    def test_a_placeholder_in_an_answer_is_a_warning(self, folder):
        messages = text_record(0, answer="See <image>.")["conversations"]
        [index] = index_records([write_set(folder, [{"conversations": messages}])], cache=folder / "cache")
        [problem] = index.problems
        assert (problem.kind, problem.message) == (
            "placeholder in answer", "<image> in the answer of message 2 stays text"
        )  # fmt: skip


class TestMessages:
    def test_of_hostile_text(self):
        assert show_message("\x1b[2J\n\ud800 中") == "\\x1b[2J\\n\\ud800 中"
        assert show_id("\u202e") == "\\u202e"
        assert len(show_message("x" * 10**6)) < 700
        assert show_message("a" * 10**6 + "end").endswith("end")

    def test_of_ids_that_are_no_text(self):
        deep: list = []
        for _ in range(100_000):
            deep = [deep]
        assert show_id(deep) == "(nested too deeply)"
        assert show_id(None) is None
        assert show_id(12) == "12"


class TestPolicy:
    def problems(self, count: int) -> list[Problem]:
        return [Problem("qa", i, "f.jsonl", i + 1, f"r{i}", "role", f"bad {i}") for i in range(count)]

    def test_fail_with_one(self):
        with pytest.raises(DataError) as caught:
            raise_problems(self.problems(1))
        assert str(caught.value) == "f.jsonl, line 1 (record 'r0'): bad 0"

    def test_fail_with_many(self):
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

    @pytest.mark.parametrize(("bad", "total", "most", "fine"), [
        (1, 100, 0.01, True), (2, 100, 0.01, False), (0, 5, 0.0, True), (1, 9, 0.0, False), (5, 5, 1.0, True),
    ])  # fmt: skip
    def test_most_that_may_be_left_out(self, bad, total, most, fine):
        problems = self.problems(bad)
        if fine:
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
    def test_the_others_keep_their_order(self, folder):
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

    def test_a_record_with_one_image_missing_is_left_out_whole(self, folder):
        noise(10, 40, seed=1).save(folder / "images/tall.png")
        shown = [("wide.png", "tall.png"), ("nowhere.png", "wide.png", "tall.png"), ("tall.png", "wide.png")]
        shown = [image_record(number, *names) for number, names in enumerate(shown)]
        data = open_data([write_set(folder, shown)], folder / "cache")
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
    def test_the_used_records_are_the_file_without_the_bad_ones(self, tmp_path_factory, sets):
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
            with pytest.raises(DataError, match="no records are left"):
                open_data(opened, folder / "cache")
            return
        data = open_data(opened, folder / "cache")
        assert [data[SampleIndex(i, 0)][0].key for i in range(len(data))] == expected
        epoch = data.epoch_lengths()
        assert len(epoch) == len(expected)
        assert [epoch[i] for i in range(len(epoch))] == [
            data[SampleIndex(i, 0)][0].encoded.measured for i in range(len(data))
        ]

    def test_nothing_is_left(self, folder):
        with pytest.raises(DataError, match="every record is left out"):
            open_data([write_set(folder, [BAD["role"]])], folder / "cache")


class TestPacks:
    @pytest.fixture
    def data(self, folder):
        noise(10, 40, seed=1).save(folder / "images/goes.png")
        records = [text_record(0), image_record(1, "goes.png"), image_record(2, "wide.png")]
        data = open_data([write_set(folder, records)], folder / "cache")
        (folder / "images/goes.png").unlink()
        return data

    def test_a_record_that_vanishes_is_named(self, data):
        pack = PackDataset(data)[[SampleIndex(0, 0), SampleIndex(1, 0), SampleIndex(2, 0)]]
        assert [key.index for key in pack.keys] == [0, 2]
        [skipped] = pack.skipped
        assert skipped == Skipped("qa", 1, "r1", skipped.message)
        assert "goes.png does not exist" in skipped.message

    def test_the_others_are_as_without_it(self, data):
        pack, alone = (
            PackDataset(data)[[SampleIndex(0, 0), SampleIndex(1, 0), SampleIndex(2, 0)]],
            PackDataset(data)[[SampleIndex(0, 0), SampleIndex(2, 0)]],
        )
        assert alone.skipped == ()
        for name, value in vars(alone).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(pack, name))

    def test_that_loses_all_its_records_still_runs(self, data):
        pack = PackDataset(data)[[SampleIndex(1, 0)]]
        assert (pack.keys, pack.counts.tolist(), pack.supervised.tolist()) == ((FILLER_KEY,), [False], [1])
        assert pack.input_ids.shape == (1, 2)
        assert (pack.num_tokens, pack.num_supervised, len(pack.tiles)) == (0, 0, 0)
        assert [skipped.index for skipped in pack.skipped] == [1]
        assert pack.tiles.shape == PackDataset(data)[[SampleIndex(0, 0)]].tiles.shape
        assert len(PackDataset(data, multiple=8)[[SampleIndex(1, 0)]].input_ids[0]) == 8

    def test_a_record_of_weight_zero_is_not_counted_twice(self, data):
        assert PackDataset(data)[[SampleIndex(1, 0, counts=False)]].skipped == ()

    def test_pages_and_processes_take_it(self, data):
        pack = PackDataset(data)[[SampleIndex(0, 0), SampleIndex(1, 0)]]
        assert pickle.loads(pickle.dumps(pack)).skipped == pack.skipped

    def test_without_the_policy_it_is_an_error(self, data):
        data.max_bad_fraction = None
        error = PackDataset(data)[[SampleIndex(0, 0), SampleIndex(1, 0), SampleIndex(2, 0)]]
        assert isinstance(error, DataError)
        assert (error.record, error.kind) == ("r1", "image missing")

    def test_a_changed_image_is_left_out_too(self, data, folder):
        noise(10, 10).save(folder / "images/goes.png")
        [skipped] = PackDataset(data)[[SampleIndex(1, 0)]].skipped
        assert "an image has changed since" in skipped.message


def test_a_filler_is_the_shortest_record():
    filler = encoder().filler()
    assert filler.measured == (2, 1, 0, 0, 0)
    assert filler.labels[0] < 0
    assert filler.input_ids.dtype == filler.labels.dtype == torch.int64


def test_lengths_are_those_of_the_records_that_are_used(folder):
    lines = [text_record(i, answer="a cat " * (i + 1)) for i in range(6)]
    lines[2] = BAD["role"]
    data = open_data([write_set(folder, lines)], folder / "cache")
    assert all(a < b for a, b in pairwise(data.epoch_lengths().tokens.tolist()))
    assert np.all(data.lengths[0].tokens[[2]] == 0)
    packed = pack_samples([data[SampleIndex(i, 0)] for i in range(len(data))])
    assert packed.lengths.tolist() == data.epoch_lengths().tokens.tolist()
