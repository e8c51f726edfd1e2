"""The order of records depends on the seed, epoch and step, but not on the number of ranks."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_chat.data.batching.packing import StepPlanner, bin_pack
from internvl_chat.data.batching.sampler import StepSampler, epoch_order, resampled_sizes
from internvl_chat.data.dataset import SampleIndex

WORLD_SIZES = [1, 2, 3, 4]


class TestEpochOrder:
    @settings(max_examples=50)
    @given(
        sizes=st.lists(st.integers(0, 30), min_size=1, max_size=4),
        seed=st.integers(0, 2**31),
        epoch=st.integers(0, 99),
    )
    def test_a_permutation(self, sizes, seed, epoch):
        order = epoch_order(sizes, seed=seed, epoch=epoch)
        assert order.dtype == np.int64
        assert sorted(order.tolist()) == list(range(sum(sizes)))

    def test_depends_on_seed_and_epoch(self):
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
        ("sizes", "counts"),
        [
            ([900, 100], [750, 250]),  # roots 30 : 10
            ([7], [7]),
            ([50, 50], [50, 50]),
            ([4, 0, 16], [7, 0, 13]),  # roots 2 : 0 : 4 of 20
            ([100, 400, 900], [233, 467, 700]),  # roots 1 : 2 : 3 of 1400
        ],
    )
    def test_sizes(self, sizes, counts):
        assert resampled_sizes(sizes) == counts

    @settings(max_examples=60)
    @given(st.lists(st.integers(1, 2000), min_size=1, max_size=6))
    def test_sizes_follow_the_square_roots(self, sizes):
        counts, roots = resampled_sizes(sizes), [size**0.5 for size in sizes]
        assert sum(counts) == sum(sizes)
        assert all(
            abs(count - root / sum(roots) * sum(sizes)) <= 1 + 1e-6
            for count, root in zip(counts, roots, strict=True)
        )

    @pytest.mark.parametrize("sequential", [True, False])
    def test_all_records_of_a_set_are_used_before_one_repeats(self, sequential):
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

    def test_different_records_in_each_epoch(self):
        orders = [epoch_order([900, 100], seed=1, epoch=epoch, resample=True) for epoch in (0, 0, 1)]
        assert np.array_equal(orders[0], orders[1])
        assert set(orders[0].tolist()) != set(orders[2].tolist())


SIZES = [7, 5, 11]  # 23 records
TOKENS = np.random.default_rng(3).integers(100, 1000, 23)

PLANS = {
    "packed": {"max_packed_tokens": 1500},
    "packed tightly": {"max_packed_tokens": 500},  # about half of the records are longer
    "one per pack": {},
    "three per pack": {"records_per_pack": 3},
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


def sampler(world_size=1, rank=0, step=6, plan=None, tokens=None, **options) -> StepSampler:
    sizes = options.pop("sizes", SIZES)
    tokens = TOKENS[: sum(sizes)] if tokens is None else np.array(tokens)
    planner = StepPlanner(world_size, tokens=tokens, costs=tokens.astype(np.float64) ** 1.5, **(plan or {}))
    return StepSampler(sizes, step_records=step, planner=planner, rank=rank, **options)


def steps_of(world_size: int, epoch: int = 0, **options) -> list[list[list[list[SampleIndex]]]]:
    """Return the sample indices as nested lists: steps, ranks, packs."""
    by_rank = []
    for rank in range(world_size):
        rank_sampler = sampler(world_size, rank, **options)
        rank_sampler.set_epoch(epoch)
        by_rank.append(list(rank_sampler))
    return [list(step) for step in zip(*by_rank, strict=True)]


def samples_of(packs: list[list[SampleIndex]]) -> list[SampleIndex]:
    return [sample for pack in packs for sample in pack]


def indices(packs: list[list[SampleIndex]]) -> list[int]:
    """Return the records in packs, without dummy samples."""
    return [sample.index for sample in samples_of(packs) if sample.counts]


class TestStepSampler:
    @every_plan
    @pytest.mark.parametrize("world_size", WORLD_SIZES)
    @pytest.mark.parametrize("step", [1, 2, 6, 8, 23, 30])
    @pytest.mark.parametrize(
        "options",
        [{"strategy": "random"}, {"strategy": "sequential"}, {"resample": True}],
        ids=["random", "sequential", "resampled"],
    )
    def test_ranks_together_use_the_records_of_a_single_rank(self, world_size, step, options, plan):
        single = steps_of(1, epoch=1, step=step, seed=4, plan=plan, **options)
        together = steps_of(world_size, epoch=1, step=step, seed=4, plan=plan, **options)
        assert (
            len(single) == len(together) == -(-23 // step) == len(sampler(world_size, step=step, **options))
        )
        for (packs_of_single,), ranks in zip(single, together, strict=True):
            assert all(sample.counts for sample in samples_of(packs_of_single))
            assert Counter(i for packs in ranks for i in indices(packs)) == Counter(indices(packs_of_single))
            assert len({len(packs) for packs in ranks}) == 1
            for sample in (sample for packs in ranks for sample in samples_of(packs)):
                assert (
                    type(sample.index) is int
                    and sample.epoch == 1
                    and sample.index in indices(packs_of_single)
                )

    @every_plan
    @pytest.mark.parametrize("world_size", WORLD_SIZES)
    @pytest.mark.parametrize("step", [4, 8, 23])
    def test_dummy_samples_are_the_shortest_record(self, world_size, step, plan):
        for ranks in steps_of(world_size, step=step, seed=4, plan=plan):
            shortest = min((i for packs in ranks for i in indices(packs)), key=lambda i: TOKENS[i])
            for packs in ranks:
                dummy_packs = [pack for pack in packs if not all(sample.counts for sample in pack)]
                assert packs[len(packs) - len(dummy_packs) :] == dummy_packs
                assert dummy_packs == [[SampleIndex(shortest, 0, counts=False)]] * len(dummy_packs)
                if dummy_packs and "max_packed_tokens" in plan:
                    assert all(len(pack) == 1 for pack in packs)
                elif dummy_packs:
                    assert len(indices(packs)) < max(len(indices(packs)) for packs in ranks)

    @settings(max_examples=100)
    @given(
        tokens=st.lists(st.integers(1, 90), min_size=1, max_size=40),
        world_size=st.integers(1, 5),
        step=st.integers(1, 20),
        max_tokens=st.integers(20, 200),
        seed=st.integers(0, 99),
    )
    def test_packed_steps_of_arbitrary_lengths(self, tokens, world_size, step, max_tokens, seed):
        """Each record occurs once per epoch, and packs are neither too long nor too many."""
        steps = steps_of(
            world_size,
            sizes=[len(tokens)],
            tokens=tokens,
            step=step,
            seed=seed,
            plan={"max_packed_tokens": max_tokens},
        )
        used = [i for ranks in steps for packs in ranks for i in indices(packs)]
        assert sorted(used) == list(range(len(tokens)))
        for ranks in steps:
            for pack in (pack for packs in ranks for pack in packs):
                assert len(pack) == 1 or sum(tokens[sample.index] for sample in pack) <= max_tokens
            batches = [np.array([tokens[i] for i in indices(packs)]) for packs in ranks]
            assert {len(packs) for packs in ranks} == {
                max(len(bin_pack(batch, max_tokens)) for batch in batches)
            }

    @every_plan
    @pytest.mark.parametrize("world_size", WORLD_SIZES)
    @pytest.mark.parametrize("strategy", ["random", "sequential"])
    def test_every_record_once_per_epoch(self, world_size, strategy, plan):
        steps = steps_of(world_size, strategy=strategy, plan=plan)
        used = [i for step in steps for packs in step for i in indices(packs)]
        assert sorted(used) == list(range(23))

    @every_plan
    @pytest.mark.parametrize("world_size", WORLD_SIZES)
    def test_steps_follow_the_order_of_the_epoch(self, world_size, plan):
        order = epoch_order(SIZES, seed=4, epoch=2).tolist()
        steps = steps_of(world_size, epoch=2, seed=4, plan=plan)
        used = [{i for packs in step for i in indices(packs)} for step in steps]
        assert used == [set(order[0:6]), set(order[6:12]), set(order[12:18]), set(order[18:23])]

    def test_plan_affects_packs_but_not_the_records_of_a_step(self):
        epochs = [steps_of(2, seed=4, plan=plan) for plan in PLANS.values()]
        used = [[{i for packs in step for i in indices(packs)} for step in steps] for steps in epochs]
        assert all(records == used[0] for records in used)
        assert all(a != b for a, b in pairwise(epochs))

    def test_a_single_rank_reads_a_step_in_order(self):
        order = epoch_order(SIZES, seed=4, epoch=0).tolist()
        steps = steps_of(1, seed=4, plan=PLANS["three per pack"])
        assert [[[sample.index for sample in pack] for pack in packs] for (packs,) in steps][:2] == [
            [order[0:3], order[3:6]],
            [order[6:9], order[9:12]],
        ]

    def test_sequential_packs_by_hand(self):
        # Costs follow tokens. 900 | 800, 300 | 900 + 300 -> 900, 200 | 800, 300; the same in both epochs.
        tokens = [200, 900, 300, 800, 100, 400]
        for epoch in (0, 1):
            steps = steps_of(
                2,
                epoch=epoch,
                sizes=[4, 2],
                tokens=tokens,
                step=4,
                strategy="sequential",
                plan={"max_packed_tokens": 1000},
            )
            assert steps == [
                [
                    [[SampleIndex(1, epoch)], [SampleIndex(0, epoch)]],
                    [[SampleIndex(3, epoch)], [SampleIndex(2, epoch)]],
                ],
                [[[SampleIndex(5, epoch)]], [[SampleIndex(4, epoch)]]],
            ]

    @pytest.mark.parametrize("plan", [{}, {"max_packed_tokens": 1}], ids=["one per pack", "packed"])
    @pytest.mark.parametrize(
        ("world_size", "step", "sizes", "last"),
        [
            (2, 6, [23], [(3, 0), (2, 1)]),
            (4, 8, [23], [(2, 0), (2, 0), (2, 0), (1, 1)]),
            (4, 4, [9], [(1, 0), (0, 1), (0, 1), (0, 1)]),
            (3, 6, [10], [(2, 0), (1, 1), (1, 1)]),
            (4, 8, [16], [(2, 0)] * 4),
            (4, 2, [4], [(1, 0), (1, 0), (0, 1), (0, 1)]),
        ],
    )
    def test_dummy_samples_of_the_last_step(self, world_size, step, sizes, last, plan):
        """Number of single-record packs and of dummy samples per rank; all records have equal lengths."""
        ranks = steps_of(world_size, step=step, sizes=sizes, tokens=[5] * sum(sizes), plan=plan)[-1]
        assert all(len(pack) == 1 for packs in ranks for pack in packs)
        assert [(len(indices(packs)), len(packs) - len(indices(packs))) for packs in ranks] == last

    @every_plan
    def test_costs_balance_each_step(self, plan):
        steps = steps_of(2, seed=1, plan=plan, step=10)[:2]
        loads = [[sum(TOKENS[i] for i in indices(packs)) for packs in step] for step in steps]
        order = epoch_order(SIZES, seed=1, epoch=0)
        even = [[TOKENS[order[i : i + 5]].sum() for i in (start, start + 5)] for start in (0, 10)]
        difference, even_difference = (sum(max(load) - min(load) for load in both) for both in (loads, even))
        assert difference < even_difference / 2

    @every_plan
    def test_epochs(self, plan):
        epochs = [steps_of(1, epoch=epoch, plan=plan) for epoch in range(3)]
        used = [{sample.epoch for (packs,) in steps for sample in samples_of(packs)} for steps in epochs]
        assert used == [{0}, {1}, {2}]
        orders = [[i for (packs,) in steps for i in indices(packs)] for steps in epochs]
        assert all(a != b for a, b in pairwise(orders))

    @every_plan
    def test_set_epoch_can_go_back(self, plan):
        step_sampler = sampler(plan=plan)
        first = list(step_sampler)
        step_sampler.set_epoch(1)
        assert list(step_sampler) != first
        step_sampler.set_epoch(0)
        assert list(step_sampler) == first

    def test_set_epoch_does_not_affect_a_running_iteration(self):
        step_sampler = sampler()
        expected, iterator = list(step_sampler), iter(step_sampler)
        steps = [next(iterator)]
        step_sampler.set_epoch(1)
        assert steps + list(iterator) == expected

    def test_a_step_by_its_number(self):
        step_sampler = sampler(world_size=2, rank=1, seed=4)
        parts = [step_sampler.step(1, number).tolist() for number in range(4)]
        assert [len(part) for part in parts] == [6, 6, 6, 5]
        assert [i for part in parts for i in part] == epoch_order(SIZES, seed=4, epoch=1).tolist()
        assert step_sampler.step(0, 3).tolist() == epoch_order(SIZES, seed=4, epoch=0).tolist()[18:]

    @every_plan
    @pytest.mark.parametrize("rank", [0, 1, 2])
    def test_the_packs_of_a_step_by_its_number(self, rank, plan):
        """A resumed run reads the same packs."""
        step_sampler = sampler(world_size=3, rank=rank, seed=4, plan=plan)
        step_sampler.set_epoch(2)
        all_steps = list(step_sampler)
        resumed = sampler(world_size=3, rank=rank, seed=4, plan=plan)
        assert [resumed.packs(2, number) for number in reversed(range(4))] == all_steps[::-1]
        assert resumed.epoch == 0

    def test_depends_on_the_seed_alone(self):
        np.random.seed(0)
        first = list(sampler(seed=4, plan=PLANS["packed"]))
        np.random.seed(1)
        assert list(sampler(seed=4, plan=PLANS["packed"])) == first
        assert list(sampler(seed=5, plan=PLANS["packed"])) != first
