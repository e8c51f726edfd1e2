"""Packs of hand-made samples: what lies where, and what of it counts."""

import pytest
import torch

from internvl_chat.data.collator import StepCollator, pack_samples
from internvl_chat.data.dataset import RecordKey, Sample
from internvl_chat.data.encoding import Encoded
from internvl_chat.data.tiling import Grid


def sample(number: int, labels: list[int], tiles: int = 0) -> Sample:
    """A sample with as many tokens as labels: ids are 100, 101, ... in the first, 200, ... in the second."""
    ids = torch.arange(len(labels)) + 100 * number
    encoded = Encoded(ids, torch.tensor(labels), (Grid(tiles, 1, False),) if tiles else ())
    pixels = torch.full((tiles, 2, 2, 3), number, dtype=torch.uint8)
    return Sample(RecordKey("set", number), f"id{number}", encoded, pixels)


FIRST = sample(1, [-100, -100, 102], tiles=2)
SECOND = sample(2, [-100, 201, 202, -100, 204])
THIRD = sample(3, [-100], tiles=1)


@pytest.fixture
def pack():
    return pack_samples([(FIRST, True), (SECOND, False), (THIRD, True)])


class TestPack:
    def test_records_behind_one_another(self, pack):
        assert pack.input_ids.tolist() == [[100, 101, 102, 200, 201, 202, 203, 204, 300]]
        assert pack.labels.tolist() == [[-100, -100, 102, -100, 201, 202, -100, 204, -100]]

    def test_positions_begin_anew(self, pack):
        assert pack.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0]]

    def test_bounds(self, pack):
        assert pack.cu_seq_lens.tolist() == [0, 3, 8, 9]
        assert pack.cu_seq_lens.dtype == torch.int32
        assert pack.max_length == 5

    def test_tiles_in_order(self, pack):
        assert pack.tiles.shape == (3, 2, 2, 3)
        assert pack.tiles.dtype == torch.uint8
        assert pack.tiles[:, 0, 0, 0].tolist() == [1, 1, 3]

    def test_supervised_and_counts(self, pack):
        assert pack.supervised.tolist() == [1, 3, 0]
        assert pack.counts.tolist() == [True, False, True]
        assert pack.counts.dtype == torch.bool

    def test_keys(self, pack):
        assert pack.keys == (RecordKey("set", 1), RecordKey("set", 2), RecordKey("set", 3))

    def test_sums_leave_out_what_does_not_count(self, pack):
        assert (pack.num_tokens, pack.num_supervised) == (3 + 1, 1)

    @pytest.mark.parametrize(
        ("counts", "tokens", "supervised"),
        [((True, True), 8, 4), ((False, True), 5, 3), ((False, False), 0, 0)],
    )
    def test_sums(self, counts, tokens, supervised):
        pack = pack_samples(list(zip((FIRST, SECOND), counts, strict=True)))
        assert (pack.num_tokens, pack.num_supervised) == (tokens, supervised)

    def test_one_record(self):
        pack = pack_samples([(SECOND, True)])
        assert pack.input_ids.tolist() == [[200, 201, 202, 203, 204]]
        assert pack.position_ids.tolist() == [[0, 1, 2, 3, 4]]
        assert pack.cu_seq_lens.tolist() == [0, 5]
        assert pack.tiles.shape == (0, 2, 2, 3)

    def test_the_same_record_twice(self):
        pack = pack_samples([(FIRST, True), (FIRST, False)])
        assert pack.cu_seq_lens.tolist() == [0, 3, 6]
        assert (pack.num_tokens, len(pack.tiles), pack.keys[0]) == (3, 4, pack.keys[1])

    @pytest.mark.parametrize("place", [0, 1])
    def test_the_first_token_of_a_record_is_no_target(self, place):
        """Behind another record it would be predicted from that record's last token."""
        samples = [(FIRST, True)]
        samples.insert(place, (sample(4, [400, 401]), True))
        with pytest.raises(ValueError, match="first token of a record is never a target"):
            pack_samples(samples)


class TestStepCollator:
    @pytest.mark.parametrize(
        ("size", "cut"),
        [
            (1, [[1], [2], [3], [4], [5]]),
            (2, [[1, 2], [3, 4], [5]]),
            (3, [[1, 2, 3], [4, 5]]),
            (5, [[1, 2, 3, 4, 5]]),
            (9, [[1, 2, 3, 4, 5]]),
        ],
    )
    def test_cut_in_order(self, size, cut):
        share = [(sample(number, [-100, 0]), number != 5) for number in range(1, 6)]
        packs = StepCollator(size)(share)
        assert [[key.index for key in pack.keys] for pack in packs] == cut
        assert sum(pack.num_tokens for pack in packs) == 4 * 2

    def test_an_empty_share(self):
        assert StepCollator(2)([]) == []

    def test_records_keep_their_own_weight(self):
        (pack,) = StepCollator(2)([(FIRST, False), (SECOND, True)])
        assert (pack.counts.tolist(), pack.num_supervised) == ([False, True], 3)
