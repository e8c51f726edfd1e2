"""Packs of handwritten samples: positions, boundaries and counts."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from internvl_chat.data.batching.collator import Pack, PackDataset, pack_samples
from internvl_chat.data.batching.packing import StepPlanner
from internvl_chat.data.batching.sampler import StepSampler
from internvl_chat.data.dataset import SampleIndex, TrainingData
from internvl_chat.data.encode.encoder import EncodedConversation, RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.encode.tiling import Grid
from internvl_chat.data.encode.tokenizer_training import train_tokenizer
from internvl_chat.data.record_set import RecordKey, RecordSet, Sample
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.utils.errors import DataError

CPU = torch.device("cpu")


def sample(number: int, labels: list[int], tiles: int = 0, positions: tuple[int, ...] = ()) -> Sample:
    """Return a sample with ids 100, 101, ... for number 1, and 200, 201, ... for number 2."""
    ids = torch.arange(len(labels)) + 100 * number
    grids = (Grid(tiles, 1, False),) if tiles else ()
    encoded = EncodedConversation(
        ids, torch.tensor(labels), torch.tensor(positions, dtype=torch.int64), grids
    )
    pixels = torch.full((tiles, 2, 2, 3), number, dtype=torch.uint8)
    return Sample(RecordKey("set", number), f"id{number}", encoded, pixels)


FIRST = sample(1, [-100, -100, 102], tiles=2, positions=(0, 1))
SECOND = sample(2, [-100, 201, 202, -100, 204])
THIRD = sample(3, [-100], tiles=1, positions=(0,))


@pytest.fixture
def pack():
    return pack_samples([(FIRST, True), (SECOND, False), (THIRD, True)])


class TestPack:
    def test_records_are_concatenated(self, pack):
        assert pack.input_ids.tolist() == [[100, 101, 102, 200, 201, 202, 203, 204, 300]]
        assert pack.labels.tolist() == [[-100, -100, 102, -100, 201, 202, -100, 204, -100]]

    def test_positions_restart_in_each_record(self, pack):
        assert pack.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0]]

    def test_boundaries(self, pack):
        assert pack.cu_seq_lens.tolist() == [0, 3, 8, 9]
        assert pack.cu_seq_lens.dtype == torch.int32
        assert pack.max_length == 5

    def test_tiles_in_order(self, pack):
        assert pack.tiles.shape == (3, 2, 2, 3)
        assert pack.tiles.dtype == torch.uint8
        assert pack.tiles[:, 0, 0, 0].tolist() == [1, 1, 3]

    def test_image_positions_in_the_row(self, pack):
        assert pack.image_positions.tolist() == [0, 1, 8]
        assert pack.image_positions.dtype == torch.int64

    def test_label_positions_precede_supervised_tokens(self, pack):
        """Tokens 102, 201, 202 and 204 are supervised; the first token after FIRST is not."""
        assert pack.label_positions.tolist() == [1, 3, 4, 6]
        assert pack.label_positions.dtype == torch.int64
        assert pack.labels[0, pack.label_positions + 1].tolist() == [102, 201, 202, 204]

    def test_supervised_and_counts(self, pack):
        assert pack.supervised.tolist() == [1, 3, 0]
        assert pack.counts.tolist() == [True, False, True]
        assert pack.counts.dtype == torch.bool

    def test_keys(self, pack):
        assert pack.keys == (RecordKey("set", 1), RecordKey("set", 2), RecordKey("set", 3))

    def test_totals_exclude_records_that_do_not_count(self, pack):
        assert (pack.num_tokens, pack.num_supervised) == (3 + 1, 1)

    @pytest.mark.parametrize(
        ("counts", "tokens", "supervised"),
        [((True, True), 8, 4), ((False, True), 5, 3), ((False, False), 0, 0)],
    )
    def test_totals(self, counts, tokens, supervised):
        pack = pack_samples(list(zip((FIRST, SECOND), counts, strict=True)))
        assert (pack.num_tokens, pack.num_supervised) == (tokens, supervised)

    def test_one_record(self):
        pack = pack_samples([(SECOND, True)])
        assert pack.input_ids.tolist() == [[200, 201, 202, 203, 204]]
        assert pack.position_ids.tolist() == [[0, 1, 2, 3, 4]]
        assert pack.cu_seq_lens.tolist() == [0, 5]
        assert pack.tiles.shape == (0, 2, 2, 3)
        assert pack.image_positions.tolist() == [] and pack.image_positions.dtype == torch.int64
        assert pack.label_positions.tolist() == [0, 1, 3]

    def test_nothing_supervised(self):
        pack = pack_samples([(THIRD, True), (THIRD, True)])
        assert pack.label_positions.shape == (0,)
        assert (pack.image_positions.tolist(), pack.num_supervised) == ([0, 1], 0)

    def test_the_same_record_twice(self):
        pack = pack_samples([(FIRST, True), (FIRST, False)])
        assert pack.cu_seq_lens.tolist() == [0, 3, 6]
        assert (pack.num_tokens, len(pack.tiles), pack.keys[0]) == (3, 4, pack.keys[1])

    @pytest.mark.parametrize("position", [0, 1])
    def test_supervised_first_token_is_an_error(self, position):
        """It would be predicted from the last token of the previous record."""
        samples = [(FIRST, True)]
        samples.insert(position, (sample(4, [400, 401]), True))
        with pytest.raises(ValueError, match="first token of a record must not be supervised"):
            pack_samples(samples)

    @settings(max_examples=60)
    @given(
        st.lists(
            st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=6
        )
    )
    def test_positions_of_random_records(self, records):
        """Each token may receive a vision feature, be supervised, or both."""
        samples = []
        for number, tokens in enumerate(records):
            labels = [-100, *(7 if supervised else -100 for _, supervised in tokens[1:])]
            features = tuple(i for i, (feature, _) in enumerate(tokens) if feature)
            samples.append((sample(number, labels, positions=features), True))
        pack = pack_samples(samples)
        row = [(number, i) for number, tokens in enumerate(records) for i in range(len(tokens))]
        expected = [position for position, (number, i) in enumerate(row) if records[number][i][0]]
        assert pack.image_positions.tolist() == expected
        before = [position - 1 for position, (number, i) in enumerate(row) if i and records[number][i][1]]
        assert pack.label_positions.tolist() == before
        assert len(before) == pack.num_supervised == int(pack.supervised.sum())


class TestMultiple:
    """Rows are padded to a multiple; the padding does not belong to any record."""

    @pytest.fixture
    def padded(self):
        return pack_samples([(FIRST, True), (SECOND, False), (THIRD, True)], multiple=4)

    def test_padding_is_an_additional_segment(self, padded):
        """3 records with 9 tokens, and 3 tokens of padding."""
        assert padded.input_ids.tolist() == [[100, 101, 102, 200, 201, 202, 203, 204, 300, 0, 0, 0]]
        assert padded.labels.tolist()[0][9:] == [-100] * 3
        assert padded.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0, 0, 1, 2]]
        assert padded.cu_seq_lens.tolist() == [0, 3, 8, 9, 12]
        assert padded.cu_seq_lens.dtype == torch.int32

    def test_max_length_is_rounded_up(self, padded):
        assert padded.max_length == 8  # of 5
        assert pack_samples([(SECOND, True)], multiple=5).max_length == 5

    def test_records_and_totals_are_unchanged(self, pack, padded):
        for name in ("image_positions", "label_positions", "tiles", "supervised", "counts", "lengths"):
            assert torch.equal(getattr(padded, name), getattr(pack, name)), name
        assert padded.lengths.tolist() == [3, 5, 1]
        assert (padded.num_tokens, padded.num_supervised) == (pack.num_tokens, pack.num_supervised) == (4, 1)
        assert padded.keys == pack.keys

    @pytest.mark.parametrize("multiple", [1, 3, 9])
    def test_multiple_of_the_row_length_adds_no_padding(self, pack, multiple):
        found = pack_samples([(FIRST, True), (SECOND, False), (THIRD, True)], multiple)
        assert found.max_length == -(-5 // multiple) * multiple
        for name, value in vars(pack).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(getattr(found, name), value), name

    @pytest.mark.parametrize("multiple", [8, 16, 128])
    def test_padding_may_be_longer_than_every_record(self, multiple):
        found = pack_samples([(FIRST, True)], multiple)
        assert found.input_ids.shape == found.labels.shape == found.position_ids.shape == (1, multiple)
        assert (found.cu_seq_lens.tolist(), found.max_length) == ([0, 3, multiple], multiple)
        assert found.position_ids[0, 3:].tolist() == list(range(multiple - 3))

    @settings(max_examples=60)
    @given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 20))
    def test_random_lengths(self, lengths, multiple):
        samples = [(sample(i, [-100] + [7] * (n - 1)), i % 2 == 0) for i, n in enumerate(lengths)]
        plain, found = pack_samples(samples), pack_samples(samples, multiple)
        total = found.input_ids.shape[1]
        assert total % multiple == 0 and sum(lengths) <= total < sum(lengths) + multiple
        assert found.cu_seq_lens[-1] == total
        assert found.cu_seq_lens.diff().min() > 0
        assert found.max_length % multiple == 0 and found.max_length >= int(found.cu_seq_lens.diff().max())
        assert found.lengths.tolist() == lengths
        assert (found.num_tokens, found.num_supervised) == (plain.num_tokens, plain.num_supervised)
        assert torch.equal(found.label_positions, plain.label_positions)


class TestInputs:
    def test_names_of_the_text_inputs(self, pack):
        inputs = pack.text_inputs(CPU)
        tensors = ("input_ids", "labels", "image_positions", "label_positions", "position_ids", "cu_seq_lens")
        assert inputs.keys() == {*tensors, "max_length"}
        assert all(torch.equal(inputs[name], getattr(pack, name)) for name in tensors)
        assert inputs["max_length"] == 5

    def test_device(self, pack):
        meta = torch.device("meta")
        inputs = pack.text_inputs(meta)
        assert {value.device for value in inputs.values() if isinstance(value, torch.Tensor)} == {meta}
        assert pack.pixel_values(meta, "imagenet").device == meta

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_tiles_are_normalized(self, pack, dtype):
        pixels = pack.pixel_values(CPU, "imagenet", dtype)
        assert (pixels.shape, pixels.dtype) == ((3, 3, 2, 2), dtype)
        means, deviations = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        for found, value in zip(pixels, (1, 1, 3), strict=True):
            expected = torch.from_numpy((value / 255 - means) / deviations)[:, None, None].expand(3, 2, 2)
            tolerance = 1e-6 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0)

    def test_float32_by_default(self, pack):
        assert pack.pixel_values(CPU, "siglip").dtype == torch.float32

    def test_no_tiles(self):
        assert pack_samples([(SECOND, True)]).pixel_values(CPU, "imagenet").shape == (0, 3, 2, 2)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: pinned memory")
    def test_pinned_memory(self, pack):
        pinned = pack.pin_memory()
        for name, value in vars(pack).items():
            if isinstance(value, torch.Tensor):
                assert getattr(pinned, name).is_pinned() and torch.equal(getattr(pinned, name), value)
            else:
                assert getattr(pinned, name) == value


ANSWERS = ["One.", "Two of them.", "Three, I think.", "It is four.", "Five."]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TrainingData:
    """Five records; 1, 3 and 4 have an image, and the images of 3 and 4 are missing."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for number, answer in enumerate(ANSWERS):
        messages = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": answer}]
        record = {"id": f"r{number}", "conversations": messages}
        if number in (1, 3, 4):
            messages[0]["value"] = "<image>\nHow many?"
            record["image"] = f"{number}.png"
        if number == 1:
            Image.new("RGB", (56, 56), (40, 40, 40)).save(folder / "1.png")
        records.append(record)
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = Preprocessing(tile_size=56, tokens_per_tile=4, max_dynamic_patch=1, max_seq_length=400)
    encoder = RecordEncoder(train_tokenizer(["How many? " + " ".join(ANSWERS)], 300), options)
    spec = DatasetSpec("numbers", folder, folder / "a.jsonl")
    return TrainingData([RecordSet(spec, encoder)])


class TestPackDataset:
    @pytest.mark.parametrize(
        "sample_indices",
        [
            [SampleIndex(0, 0)],
            [SampleIndex(2, 0), SampleIndex(0, 0), SampleIndex(1, 0)],
            [SampleIndex(1, 3), SampleIndex(1, 3, counts=False)],
            (SampleIndex(2, 1, counts=False),),
        ],
    )
    def test_pack_keeps_the_order_of_the_indices(self, data, sample_indices):
        pack = PackDataset(data)[sample_indices]
        assert isinstance(pack, Pack)
        assert pack.keys == tuple(RecordKey("numbers", i.index) for i in sample_indices)
        assert pack.counts.tolist() == [i.counts for i in sample_indices]
        samples = [data.sets[0].load(i.index) for i in sample_indices]
        assert pack.input_ids[0].tolist() == [
            token for s in samples for token in s.encoded.input_ids.tolist()
        ]
        assert torch.equal(pack.tiles, torch.cat([s.tiles for s in samples]))

    def test_positions_of_image_tokens_and_labels(self, data):
        pack = PackDataset(data)[[SampleIndex(0, 0), SampleIndex(1, 0), SampleIndex(2, 0)]]
        context = data.sets[0].encoder.template.context_id
        expected = [position for position, token in enumerate(pack.input_ids[0].tolist()) if token == context]
        assert pack.image_positions.tolist() == expected and len(expected) == 4
        supervised = [position for position, label in enumerate(pack.labels[0].tolist()) if label >= 0]
        assert pack.label_positions.tolist() == [position - 1 for position in supervised]

    def test_multiple_applies_to_every_pack(self, data):
        plain, padded = (
            PackDataset(data, multiple)[[SampleIndex(0, 0), SampleIndex(1, 0)]] for multiple in (1, 64)
        )
        assert padded.input_ids.shape[1] == -(-plain.input_ids.shape[1] // 64) * 64
        assert torch.equal(padded.lengths, plain.lengths)

    def test_first_error_is_returned(self, data):
        packs = PackDataset(data)
        for sample_indices, record in (
            ([SampleIndex(0, 0), SampleIndex(4, 0), SampleIndex(3, 0)], 4),
            ([SampleIndex(3, 0), SampleIndex(4, 0)], 3),
        ):
            error = packs[sample_indices]
            assert isinstance(error, DataError)
            assert error.record == f"r{record}" and f"{record}.png" in str(error)

    def test_length(self, data):
        assert len(PackDataset(data)) == len(ANSWERS)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_dataloader_yields_the_packs_of_a_step(self, data, workers):
        """Worker processes return errors, too."""
        tokens = np.array([5, 4, 3, 2, 1])
        sampler = StepSampler(
            [5], step_records=3, planner=StepPlanner(1, tokens, tokens, 9), strategy="sequential"
        )
        dataloader = DataLoader(
            PackDataset(data), batch_sampler=sampler, collate_fn=list, num_workers=workers
        )
        first, second = dataloader
        # 5 | 4, 3 of at most 9 tokens, then 2 and 1 together.
        assert [[key.index for key in pack.keys] for pack in first] == [[0], [1, 2]]
        (error,) = second
        assert isinstance(error, DataError) and error.record == "r3"
