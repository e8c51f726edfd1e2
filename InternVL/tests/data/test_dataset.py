"""Datasets on disk: records of an epoch, loaded samples, and errors that name the record."""

import json
import logging
import pickle
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from internvl_chat.data.dataset import SampleIndex, TrainingData, build_sets
from internvl_chat.data.encode.encoder import RecordEncoder, RecordLengths
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tokenizer_training import train_tokenizer
from internvl_chat.data.index.cache import Lengths
from internvl_chat.data.record_set import RecordKey, RecordSet
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.utils.errors import DataError

TILE, TOKENS = 16, 3


@pytest.fixture(scope="module")
def encoder():
    tokenizer = train_tokenizer(["what is this ? a cat on a mat"] * 20, 300)
    options = {"tile_size": TILE, "tokens_per_tile": TOKENS, "max_dynamic_patch": 4, "max_seq_length": 400}
    return RecordEncoder(tokenizer, Preprocessing(**options))


@pytest.fixture(autouse=True)
def _warnings_are_seen(monkeypatch):
    monkeypatch.setattr(logging.getLogger("internvl_chat"), "propagate", True)


def text_record(number: int, **extra) -> dict:
    messages = [{"from": "human", "value": f"what is {number} ?"}, {"from": "gpt", "value": f"a {number}"}]
    return {"id": f"r{number}", "conversations": messages, **extra}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def make(tmp_path, encoder):
    """Write records (objects or raw lines) and open them as a dataset with images."""

    def make(records, name="qa", **options) -> RecordSet:
        lines = [line if isinstance(line, str) else json.dumps(line) for line in records]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(lines) + "\n")
        return RecordSet(DatasetSpec(name, tmp_path / "images", file, **options), encoder)

    (tmp_path / "images").mkdir()
    noise(40, 10).save(tmp_path / "images" / "wide.png")
    noise(10, 40, seed=1).save(tmp_path / "images" / "tall.png")
    return make


class TestRecordsOfAnEpoch:
    @pytest.mark.parametrize(
        ("repeat", "used"),
        [(1, 10), (1.0, 10), (3, 30), (2.0, 20), (0.5, 5), (0.25, 2), (0.99, 9), (0.1, 1), (0.05, 0)],
    )
    def test_repeat_time(self, make, repeat, used):
        records = make([text_record(i) for i in range(10)], repeat_time=repeat)
        assert (len(records), records.num_used) == (10, used)

    def test_fraction_uses_the_first_records(self, make):
        part = make([text_record(i) for i in range(10)], repeat_time=0.3)
        assert [part.first(limit) for limit in (None, 2, 5)] == [range(3), range(2), range(3)]
        data = TrainingData([part])
        assert [data[SampleIndex(i, 0)][0].id for i in range(len(data))] == ["r0", "r1", "r2"]

    def test_whole_number_repeats_the_records(self, make):
        data = TrainingData([make([text_record(i) for i in range(2)], repeat_time=3)])
        assert [data[SampleIndex(i, 0)][0].id for i in range(len(data))] == ["r0", "r1"] * 3

    def test_several_sets(self, make):
        shapes = [("a", 3, 1), ("b", 4, 0.1), ("c", 2, 3), ("d", 5, 0.5), ("e", 1, 1)]
        sets = [
            make([text_record(i) for i in range(count)], name=name, repeat_time=repeat)
            for name, count, repeat in shapes
        ]
        data = TrainingData(sets)
        expected = [
            (name, i) for name, i in zip("aaaccccccdde", [0, 1, 2, 0, 1, 0, 1, 0, 1, 0, 1, 0], strict=True)
        ]
        assert data.sizes == [3, 0, 6, 2, 1]
        assert len(data) == len(expected)
        located = [data.locate(i) for i in range(len(data))]
        assert [(records.spec.name, index) for records, index in located] == expected
        assert [data[SampleIndex(i, 0)][0].key for i in range(len(data))] == [
            RecordKey(*key) for key in expected
        ]
        with pytest.raises(IndexError):
            data.locate(len(data))

    @pytest.mark.parametrize("sets", [0, 1, 2])
    def test_no_records_left(self, make, sets):
        few = [make([text_record(0)], name=f"n{i}", repeat_time=0.5) for i in range(sets)]
        with pytest.raises(DataError, match="no records left"):
            TrainingData(few)

    @pytest.mark.parametrize("counts", [True, False])
    def test_counts_is_passed_through(self, make, counts):
        sample, passed_on = TrainingData([make([text_record(0)])])[SampleIndex(0, 0, counts)]
        assert (sample.id, passed_on) == ("r0", counts)


class TestSamples:
    def test_text(self, make, encoder):
        sample = make([text_record(7)]).load(0)
        text = encoder.tokenizer.decode(sample.encoded.input_ids)
        assert text.endswith(
            "<|im_start|>user\nwhat is 7 ?<|im_end|>\n<|im_start|>assistant\na 7<|im_end|>\n"
        )
        assert (sample.key, sample.id) == (RecordKey("qa", 0), "r7")
        assert sample.tiles.shape == (0, TILE, TILE, 3)

    def test_images(self, make, encoder):
        record = text_record(7, image=["wide.png", "tall.png"])
        record["conversations"][0]["value"] = "<image>\n<image>\nwhat is 7 ?"
        sample = make([record]).load(0)
        # Two tiles and a thumbnail each: half of the budget of four.
        context = int(
            (sample.encoded.input_ids == encoder.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")).sum()
        )
        assert context == 6 * TOKENS
        thumbnails = [noise(40, 10), noise(10, 40, seed=1)]
        assert sample.tiles.shape == (6, TILE, TILE, 3)
        for tile, image in zip(sample.tiles[[2, 5]], thumbnails, strict=True):
            assert np.array_equal(tile, image.resize((TILE, TILE)))

    def test_encode_and_load_agree(self, make):
        records = make([text_record(0, image="wide.png"), text_record(1)])
        for index in range(2):
            record, encoded = records.encode(index)
            sample = records.load(index)
            assert record.id == sample.id
            assert torch.equal(encoded.input_ids, sample.encoded.input_ids)
            assert torch.equal(encoded.labels, sample.encoded.labels)
            assert sum(grid.tiles for grid in encoded.grids) == len(sample.tiles)

    @pytest.mark.parametrize(("own", "tiles"), [(None, 5), (1, 1), (2, 3), (3, 4), (6, 5), (12, 5)])
    def test_tile_limit_of_the_entry_takes_precedence(self, make, own, tiles):
        """Without a limit, 40 x 10 pixels are four tiles and a thumbnail."""
        records = make([text_record(0, image="wide.png")], max_dynamic_patch=own)
        assert len(records.load(0).tiles) == tiles

    def test_limit_above_that_of_the_run(self, make, tmp_path):
        noise(80, 10).save(tmp_path / "images" / "wider.png")
        records = make([text_record(0, image="wider.png")], max_dynamic_patch=8)
        assert len(records.load(0).tiles) == 9

    def test_each_dataset_has_its_own_limit(self, make, tmp_path, encoder):
        specs = [
            make([text_record(0, image="wide.png")], name=f"n{limit}", max_dynamic_patch=limit).spec
            for limit in (1, 2, None)
        ]
        assert [len(records.load(0).tiles) for records in build_sets(specs, encoder)] == [1, 3, 5]


class TestAugmentation:
    @pytest.fixture
    def data(self, make):
        def data(seed=0, augment=True) -> TrainingData:
            records = [text_record(i, image="wide.png") for i in range(2)]
            return TrainingData([make(records, data_augment=augment, repeat_time=2)], seed=seed)

        return data

    def tiles(self, data: TrainingData, index: int = 0, epoch: int = 0) -> torch.Tensor:
        return data[SampleIndex(index, epoch)][0].tiles

    def test_independent_of_process_and_order(self, data):
        first, second = data(), data()
        forwards = [self.tiles(first, i) for i in range(4)]
        random.seed(5)
        torch.manual_seed(5)
        backwards = [self.tiles(second, i) for i in (3, 2, 1, 0)][::-1]
        assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))

    def test_varies_with_seed_epoch_and_repetition(self, data):
        # Indices 0 and 2 are the same record, and all four show the same image.
        variants = [self.tiles(data(), i) for i in range(4)]
        variants += [self.tiles(data(), 0, epoch=1), self.tiles(data(seed=1), 0)]
        assert len({tiles.numpy().tobytes() for tiles in variants}) == len(variants)

    def test_independent_of_counts(self, data):
        assert torch.equal(
            data()[SampleIndex(1, 2, False)][0].tiles, data()[SampleIndex(1, 2, True)][0].tiles
        )

    def test_only_if_enabled_in_the_entry(self, data):
        plain = data(augment=False)
        reference = noise(40, 10).resize((4 * TILE, TILE))
        for sample_index in (SampleIndex(0, 0), SampleIndex(0, 1), SampleIndex(3, 0)):
            tiles = plain[sample_index][0].tiles.numpy()
            assert np.array_equal(np.concatenate(tiles[:4], axis=1), reference)

    def test_disabled_outside_training(self, make):
        records = make([text_record(0, image="wide.png")], data_augment=True)
        assert np.array_equal(records.load(0).tiles[4], noise(40, 10).resize((TILE, TILE)))


class TestFaults:
    """The faulty record is the third, on line 4 after a blank line."""

    def fail(self, make, faulty, load="load") -> DataError:
        records = make([text_record(0), "", text_record(1), faulty])
        assert records.load(1).id == "r1"
        with pytest.raises(DataError) as caught:
            getattr(records, load)(2)
        assert (caught.value.file, caught.value.line) == (records.spec.annotation, 4)
        assert str(caught.value).startswith(f"{records.spec.annotation}, line 4")
        return caught.value

    @pytest.mark.parametrize("load", ["load", "encode", "measure"])
    def test_missing_image(self, make, tmp_path, load):
        error = self.fail(make, text_record(2, image="nowhere.png"), load)
        assert error.record == "r2"
        assert f"the image {tmp_path / 'images' / 'nowhere.png'} does not exist" in error.message
        assert "(record 'r2')" in str(error)

    @pytest.mark.parametrize("load", ["load", "encode", "measure"])
    @pytest.mark.parametrize("content", [b"<html>not found</html>", b"", b"\xff\xd8\xff"])
    def test_text_named_jpg(self, make, tmp_path, load, content):
        (tmp_path / "images" / "page.jpg").write_bytes(content)
        error = self.fail(make, text_record(2, image="page.jpg"), load)
        assert error.record == "r2"
        assert f"the image {tmp_path / 'images' / 'page.jpg'} cannot be read" in error.message

    def test_folder_instead_of_an_image(self, make, tmp_path):
        (tmp_path / "images" / "sub").mkdir()
        assert "cannot be read" in self.fail(make, text_record(2, image="sub")).message

    @pytest.mark.parametrize("kind", ["png", "jpg"])
    def test_truncated_image(self, make, tmp_path, kind):
        file = tmp_path / "images" / f"half.{kind}"
        noise(60, 60).save(file)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        error = self.fail(make, text_record(2, image=file.name))
        assert error.record == "r2"
        assert f"the image {file} cannot be decoded: " in error.message

    def test_second_image_is_missing(self, make, tmp_path):
        record = text_record(2, image=["wide.png", "nowhere.png"])
        record["conversations"][0]["value"] = "<image><image>"
        assert str(tmp_path / "images" / "nowhere.png") in self.fail(make, record).message

    @pytest.mark.parametrize("load", ["record", "load", "encode", "measure"])
    def test_malformed_record(self, make, load):
        error = self.fail(make, {"id": "r2", "conversations": []}, load)
        assert (error.record, "no conversation" in error.message) == ("r2", True)

    @pytest.mark.parametrize("line", ["{broken", "[1]"])
    def test_not_a_record(self, make, line):
        assert self.fail(make, line).record is None

    @pytest.mark.parametrize("load", ["load", "encode", "measure"])
    def test_too_long(self, make, load):
        record = text_record(2)
        record["conversations"][1]["value"] = "中" * 400
        error = self.fail(make, record, load)
        assert error.record == "r2"
        assert "more than max_seq_length 400" in error.message

    def test_error_can_be_pickled(self, make):
        error = self.fail(make, text_record(2, image="nowhere.png"))
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy)) == (DataError, str(error))
        assert (copy.file, copy.line, copy.record) == (error.file, error.line, error.record)

    def test_missing_annotation(self, encoder, tmp_path):
        with pytest.raises(DataError, match=r"nowhere\.jsonl: cannot be read"):
            RecordSet(DatasetSpec("qa", tmp_path, tmp_path / "nowhere.jsonl"), encoder)


class TestLength:
    def test_warning_if_it_differs(self, make, caplog):
        records = make([text_record(0), text_record(1)], length=3)
        assert caplog.messages == [f"dataset qa: 'length' is 3, but {records.spec.annotation} has 2 records"]
        assert len(records) == 2

    @pytest.mark.parametrize("length", [2, None])
    def test_no_warning_if_correct_or_absent(self, make, caplog, length):
        make([text_record(0), "", text_record(1)], length=length)
        assert caplog.messages == []


class TestLengths:
    @pytest.fixture
    def sets(self, make) -> list[RecordSet]:
        """Two records twice, two of three records, an unused dataset, and one with its own tile limit."""
        wide, tall = (text_record(0, image=f"{name}.png") for name in ("wide", "tall"))
        return [
            make([text_record(0), text_record(1, more="text")], name="text", repeat_time=2),
            make([wide, text_record(7), tall], name="images", repeat_time=0.7),
            make([text_record(0)], name="unused", repeat_time=0.5),
            make([wide], name="small", max_dynamic_patch=2),
        ]

    def lengths(self, sets: list[RecordSet]) -> list[Lengths]:
        tables = [np.array([s.measure(i) for i in range(s.num_distinct)], np.int32) for s in sets]
        return [Lengths(*table.reshape(-1, len(RecordLengths._fields)).T) for table in tables]

    def test_measure_and_load_agree(self, sets):
        for records in sets:
            for index in range(len(records)):
                assert records.measure(index) == records.load(index).encoded.lengths
                assert records.measure(index).tiles == len(records.load(index).tiles)

    def test_number_of_distinct_records(self, sets):
        assert [records.num_distinct for records in sets] == [2, 2, 0, 1]

    def test_lengths_of_an_epoch(self, sets):
        data = TrainingData(sets, lengths=self.lengths(sets))
        epoch = data.epoch_lengths()
        assert len(epoch) == len(data) == 7
        for i in range(len(data)):
            assert epoch[i] == data[SampleIndex(i, 0)][0].encoded.lengths
        assert epoch.tiles.tolist() == [0, 0, 0, 0, 5, 0, 3]
        assert {column.dtype for column in epoch.columns.values()} == {np.dtype(np.int32)}

    def test_epoch_lengths_without_lengths(self, sets):
        with pytest.raises(ValueError, match="without lengths"):
            TrainingData(sets).epoch_lengths()

    def test_lengths_of_other_datasets(self, sets):
        with pytest.raises(ValueError, match="do not match the datasets"):
            TrainingData(sets, lengths=self.lengths(sets[:1]))
        with pytest.raises(ValueError, match="do not match the datasets"):
            TrainingData(sets[1:2], lengths=self.lengths(sets[3:]))

    @pytest.mark.parametrize("file", [None, Path("cache/lengths.npz")])
    def test_changed_image_is_an_error_that_names_the_record(self, sets, tmp_path, file):
        lengths = [replace(table, file=file) for table in self.lengths(sets)]
        before = lengths[1][0]
        noise(10, 10).save(tmp_path / "images" / "wide.png")
        data = TrainingData(sets, lengths=lengths)
        error = data[SampleIndex(4, 0)]
        assert isinstance(error, DataError)
        assert (error.file, error.line, error.record) == (sets[1].spec.annotation, 1, "r0")
        assert f"{before.tokens - 4 * TOKENS} tokens ({before.supervised} supervised) and 1 tiles" in str(
            error
        )
        assert f"but {before.tokens} tokens ({before.supervised} supervised) and 5 tiles" in str(error)
        assert str(error).endswith(f"delete {file} and restart" if file else "; restart")
        assert data[SampleIndex(5, 0)][0].id == "r7"


def test_removed_tiles_are_logged(tmp_path, caplog, monkeypatch):
    """The warning contains the file, line and id."""
    import logging

    from internvl_chat.data.encode.tokenizer_training import train_tokenizer

    monkeypatch.setattr(logging.getLogger("internvl_chat"), "propagate", True)
    Image.new("RGB", (400, 100)).save(tmp_path / "wide.png")
    messages = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    line = json.dumps({"id": "wide", "image": "wide.png", "conversations": messages})
    (tmp_path / "set.jsonl").write_text(line + "\n")
    for limit, tiles in ((1000, 5), (40, 1)):
        options = Preprocessing(
            tile_size=56, tokens_per_tile=4, max_dynamic_patch=6, system_text="", max_seq_length=limit
        )
        encoder = RecordEncoder(train_tokenizer(["a"], 256), options)
        records = RecordSet(DatasetSpec("set", tmp_path, tmp_path / "set.jsonl"), encoder)
        caplog.clear()
        _, encoded = records.encode(0)
        if not encoded.tiles_lost:
            assert not caplog.records
        else:
            assert "set.jsonl, line 1 (record 'wide')" in caplog.text
            assert f"instead of {encoded.num_tiles + encoded.tiles_lost}" in caplog.text
        assert encoded.num_tiles == tiles
