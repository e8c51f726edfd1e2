"""The order of records: a function of seed, epoch and step, and the same for any number of processes."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_chat.data.order import StepSampler, deal, epoch_order, resampled_sizes

PROCESSES = [1, 2, 3, 4]


class TestEpochOrder:
    @settings(deadline=None, max_examples=50)
    @given(
        sizes=st.lists(st.integers(0, 30), min_size=1, max_size=4),
        seed=st.integers(0, 2**31),
        epoch=st.integers(0, 99),
    )
    def test_a_permutation(self, sizes, seed, epoch):
        order = epoch_order(sizes, seed=seed, epoch=epoch)
        assert order.dtype == np.int64
        assert sorted(order.tolist()) == list(range(sum(sizes)))

    def test_seed_and_epoch_decide(self):
        def order(seed, epoch):
            return tuple(epoch_order([20, 30], seed=seed, epoch=epoch).tolist())

        np.random.seed(0)
        first = order(3, 1)
        np.random.seed(1)
        assert order(3, 1) == first
        assert len({order(seed, epoch) for seed in range(4) for epoch in range(4)}) == 16
        assert list(first) != sorted(first)

    def test_sets_are_mixed(self):
        order = epoch_order([500, 500], seed=0, epoch=0)
        assert 200 < (order[:500] < 500).sum() < 300

    @pytest.mark.parametrize("epoch", [0, 5])
    def test_sequential(self, epoch):
        assert epoch_order([3, 0, 4], seed=9, epoch=epoch, sequential=True).tolist() == [0, 1, 2, 3, 4, 5, 6]


class TestResampling:
    @pytest.mark.parametrize(
        ("sizes", "draws"),
        [
            ([900, 100], [750, 250]),  # roots 30 : 10
            ([7], [7]),
            ([50, 50], [50, 50]),
            ([4, 0, 16], [7, 0, 13]),  # roots 2 : 0 : 4 of 20
            ([100, 400, 900], [233, 467, 700]),  # roots 1 : 2 : 3 of 1400
        ],
    )
    def test_sizes(self, sizes, draws):
        assert resampled_sizes(sizes) == draws

    @settings(deadline=None, max_examples=60)
    @given(st.lists(st.integers(1, 2000), min_size=1, max_size=6))
    def test_sizes_follow_the_square_roots(self, sizes):
        draws, roots = resampled_sizes(sizes), [size**0.5 for size in sizes]
        assert sum(draws) == sum(sizes)
        assert all(
            abs(drawn - root / sum(roots) * sum(sizes)) <= 1 + 1e-6
            for drawn, root in zip(draws, roots, strict=True)
        )

    @pytest.mark.parametrize("sequential", [True, False])
    def test_every_record_of_a_set_before_one_comes_twice(self, sequential):
        sizes = [900, 100, 0]
        order = epoch_order(sizes, seed=1, epoch=2, sequential=sequential, resample=True)
        assert len(order) == 1000
        uses = Counter(order.tolist())
        large = [uses[i] for i in range(900)]
        small = [uses[i] for i in range(900, 1000)]
        assert (sum(large), set(large)) == (750, {0, 1})
        assert (sum(small), set(small)) == (250, {2, 3})
        if sequential:
            assert order.tolist() == sorted(order.tolist())

    def test_other_records_each_epoch(self):
        orders = [epoch_order([900, 100], seed=1, epoch=epoch, resample=True) for epoch in (0, 0, 1)]
        assert np.array_equal(orders[0], orders[1])
        assert set(orders[0].tolist()) != set(orders[2].tolist())


class TestDeal:
    @settings(deadline=None, max_examples=80)
    @given(
        count=st.integers(0, 40),
        processes=st.integers(1, 6),
        lengths=st.none() | st.lists(st.integers(1, 9000), min_size=40, max_size=40),
    )
    def test_all_records_once_and_as_many_each(self, count, processes, lengths):
        records = np.arange(100, 100 + count)
        shares = deal(records, processes, None if lengths is None else np.array(lengths[:count], np.int64))
        assert len(shares) == processes
        assert sorted(np.concatenate(shares).tolist()) == records.tolist()
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)

    def test_in_order_without_lengths(self):
        assert [share.tolist() for share in deal(np.array([5, 3, 8, 1, 9]), 2)] == [[5, 3, 8], [1, 9]]

    def test_by_length(self):
        # Longest first, each to the lighter one that has room: 9 | 8, 7 -> 9 | 15, 6 -> 15 | 15, 2 and 1.
        records, lengths = np.array([10, 11, 12, 13, 14, 15]), np.array([1, 9, 6, 2, 8, 7])
        shares = deal(records, 2, lengths)
        assert [sorted(share.tolist()) for share in shares] == [[11, 12, 13], [10, 14, 15]]
        assert [lengths[share - 10].sum() for share in shares] == [17, 16]

    def test_one_process_gets_everything_as_it_is(self):
        assert [s.tolist() for s in deal(np.array([4, 2, 3]), 1, np.array([1, 9, 5]))] == [[4, 2, 3]]

    def test_a_full_process_gets_no_more(self):
        shares = deal(np.arange(4), 2, np.array([100, 1, 1, 1]))
        assert [len(share) for share in shares] == [2, 2]
        assert 0 in shares[0]

    @pytest.mark.parametrize("processes", [2, 4, 8])
    def test_loads_are_balanced(self, processes):
        rng = np.random.default_rng(0)
        records, lengths = np.arange(128), rng.lognormal(6, 1, 128).astype(np.int64)
        loads = [lengths[share].sum() for share in deal(records, processes, lengths)]
        plain = [lengths[share].sum() for share in deal(records, processes)]
        assert max(loads) - min(loads) < 0.2 * (max(plain) - min(plain))


SIZES = [7, 5, 11]  # 23 records


def sampler(processes=1, rank=0, step=6, **options) -> StepSampler:
    return StepSampler(
        options.pop("sizes", SIZES), step_records=step, processes=processes, rank=rank, **options
    )


def steps_of(processes: int, epoch: int = 0, **options) -> list[list[list]]:
    """Draws by step and rank."""
    by_rank = []
    for rank in range(processes):
        one = sampler(processes, rank, **options)
        one.set_epoch(epoch)
        by_rank.append(list(one))
    return [list(step) for step in zip(*by_rank, strict=True)]


def indices(draws) -> list[int]:
    return [draw.index for draw in draws if draw.counts]


class TestStepSampler:
    @pytest.mark.parametrize("processes", PROCESSES)
    @pytest.mark.parametrize("step", [1, 2, 4, 6, 8, 23, 30])
    @pytest.mark.parametrize(
        "options",
        [
            {"strategy": "random"},
            {"strategy": "sequential"},
            {"strategy": "group_by_length", "lengths": np.arange(23)[::-1] * 7 % 40 + 1},
            {"resample": True},
        ],
        ids=["random", "sequential", "by length", "resampled"],
    )
    def test_the_union_of_a_step_is_that_of_one_process(self, processes, step, options):
        alone = steps_of(1, epoch=1, step=step, seed=4, **options)
        together = steps_of(processes, epoch=1, step=step, seed=4, **options)
        assert len(alone) == len(together) == -(-23 // step) == len(sampler(processes, step=step, **options))
        for (one,), ranks in zip(alone, together, strict=True):
            assert all(draw.counts for draw in one)
            assert Counter(i for draws in ranks for i in indices(draws)) == Counter(indices(one))
            assert len({len(draws) for draws in ranks}) == 1
            assert all(draw.epoch == 1 for draws in ranks for draw in draws)
            assert all(draw.index in indices(one) for draws in ranks for draw in draws)

    @pytest.mark.parametrize("processes", PROCESSES)
    @pytest.mark.parametrize("strategy", ["random", "sequential"])
    def test_every_record_once_an_epoch(self, processes, strategy):
        drawn = [
            i for step in steps_of(processes, strategy=strategy) for draws in step for i in indices(draws)
        ]
        assert sorted(drawn) == list(range(23))

    def test_the_steps_follow_the_order_of_the_epoch(self):
        order = epoch_order(SIZES, seed=4, epoch=2).tolist()
        drawn = [indices(draws) for (draws,) in steps_of(1, epoch=2, seed=4)]
        assert drawn == [order[0:6], order[6:12], order[12:18], order[18:23]]

    def test_sequential(self):
        steps = steps_of(2, strategy="sequential")
        assert [[indices(draws) for draws in step] for step in steps] == [
            [[0, 1, 2], [3, 4, 5]],
            [[6, 7, 8], [9, 10, 11]],
            [[12, 13, 14], [15, 16, 17]],
            [[18, 19, 20], [21, 22]],
        ]

    @pytest.mark.parametrize(
        ("processes", "step", "sizes", "last"),
        [
            (2, 6, [23], [(3, 0), (2, 1)]),
            (4, 8, [23], [(2, 0), (2, 0), (2, 0), (1, 1)]),
            (4, 4, [9], [(1, 0), (0, 1), (0, 1), (0, 1)]),
            (3, 6, [10], [(2, 0), (1, 1), (1, 1)]),
            (4, 8, [16], [(2, 0)] * 4),
            (4, 2, [4], [(1, 0), (1, 0), (0, 1), (0, 1)]),
        ],
    )
    def test_fillers_of_the_last_step(self, processes, step, sizes, last):
        """Per rank: draws that count, and those with weight zero."""
        ranks = steps_of(processes, step=step, sizes=sizes)[-1]
        assert [(len(indices(draws)), len(draws) - len(indices(draws))) for draws in ranks] == last

    def test_lengths_balance_each_step(self):
        lengths = np.random.default_rng(3).integers(100, 1000, 23)
        spread = {}
        for name, options in {"by length": {"lengths": lengths}, "plain": {}}.items():
            steps = steps_of(2, seed=1, **options)[:3]
            loads = [[sum(lengths[i] for i in indices(draws)) for draws in step] for step in steps]
            spread[name] = sum(max(load) - min(load) for load in loads)
        assert spread["by length"] < spread["plain"] / 2

    def test_epochs(self):
        epochs = [steps_of(1, epoch=epoch) for epoch in range(3)]
        assert [{draw.epoch for (draws,) in steps for draw in draws} for steps in epochs] == [{0}, {1}, {2}]
        orders = [[i for (draws,) in steps for i in indices(draws)] for steps in epochs]
        assert all(a != b for a, b in pairwise(orders))

    def test_an_epoch_can_be_gone_back_to(self):
        one = sampler()
        first = list(one)
        one.set_epoch(1)
        assert list(one) != first
        one.set_epoch(0)
        assert list(one) == first

    def test_a_step_by_its_number(self):
        one = sampler(processes=2, rank=1, seed=4)
        parts = [one.step(1, number).tolist() for number in range(4)]
        assert [len(part) for part in parts] == [6, 6, 6, 5]
        assert [i for part in parts for i in part] == epoch_order(SIZES, seed=4, epoch=1).tolist()
        assert one.step(0, 3).tolist() == epoch_order(SIZES, seed=4, epoch=0).tolist()[18:]
