"""The order of records: a function of seed, epoch and step, and the same for any number of processes."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_chat.data.batching.packing import StepPlanner, cut
from internvl_chat.data.batching.sampler import StepSampler, epoch_order, resampled_sizes
from internvl_chat.data.dataset import SampleIndex

PROCESSES = [1, 2, 3, 4]


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

    @settings(max_examples=60)
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


SIZES = [7, 5, 11]  # 23 records
TOKENS = np.random.default_rng(3).integers(100, 1000, 23)

PLANS = {
    "packed": {"max_packed_tokens": 1500},
    "packed tightly": {"max_packed_tokens": 500},  # about half of the records are longer
    "one a pack": {},
    "three a pack": {"records_per_pack": 3},
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


def sampler(processes=1, rank=0, step=6, plan=None, tokens=None, **options) -> StepSampler:
    sizes = options.pop("sizes", SIZES)
    tokens = TOKENS[: sum(sizes)] if tokens is None else np.array(tokens)
    planner = StepPlanner(processes, tokens=tokens, costs=tokens.astype(np.float64) ** 1.5, **(plan or {}))
    return StepSampler(sizes, step_records=step, planner=planner, rank=rank, **options)


def steps_of(processes: int, epoch: int = 0, **options) -> list[list[list[list[SampleIndex]]]]:
    """Draws by step, rank and pack."""
    by_rank = []
    for rank in range(processes):
        one = sampler(processes, rank, **options)
        one.set_epoch(epoch)
        by_rank.append(list(one))
    return [list(step) for step in zip(*by_rank, strict=True)]


def draws_of(packs: list[list[SampleIndex]]) -> list[SampleIndex]:
    return [draw for pack in packs for draw in pack]


def indices(packs: list[list[SampleIndex]]) -> list[int]:
    """The records that count in packs."""
    return [draw.index for draw in draws_of(packs) if draw.counts]


class TestStepSampler:
    @every_plan
    @pytest.mark.parametrize("processes", PROCESSES)
    @pytest.mark.parametrize("step", [1, 2, 6, 8, 23, 30])
    @pytest.mark.parametrize(
        "options",
        [{"strategy": "random"}, {"strategy": "sequential"}, {"resample": True}],
        ids=["random", "sequential", "resampled"],
    )
    def test_the_union_of_a_step_is_that_of_one_process(self, processes, step, options, plan):
        alone = steps_of(1, epoch=1, step=step, seed=4, plan=plan, **options)
        together = steps_of(processes, epoch=1, step=step, seed=4, plan=plan, **options)
        assert len(alone) == len(together) == -(-23 // step) == len(sampler(processes, step=step, **options))
        for (one,), ranks in zip(alone, together, strict=True):
            assert all(draw.counts for draw in draws_of(one))
            assert Counter(i for packs in ranks for i in indices(packs)) == Counter(indices(one))
            assert len({len(packs) for packs in ranks}) == 1
            for draw in (draw for packs in ranks for draw in draws_of(packs)):
                assert type(draw.index) is int and draw.epoch == 1 and draw.index in indices(one)

    @every_plan
    @pytest.mark.parametrize("processes", PROCESSES)
    @pytest.mark.parametrize("step", [4, 8, 23])
    def test_a_filler_is_a_pack_of_the_shortest_record_where_records_are_too_few(self, processes, step, plan):
        for ranks in steps_of(processes, step=step, seed=4, plan=plan):
            shortest = min((i for packs in ranks for i in indices(packs)), key=lambda i: TOKENS[i])
            for packs in ranks:
                fillers = [pack for pack in packs if not all(draw.counts for draw in pack)]
                assert packs[len(packs) - len(fillers) :] == fillers
                assert fillers == [[SampleIndex(shortest, 0, counts=False)]] * len(fillers)
                if fillers and "max_packed_tokens" in plan:
                    assert all(len(pack) == 1 for pack in packs)
                elif fillers:
                    assert len(indices(packs)) < max(len(indices(packs)) for packs in ranks)

    @settings(max_examples=100)
    @given(
        tokens=st.lists(st.integers(1, 90), min_size=1, max_size=40),
        processes=st.integers(1, 5),
        step=st.integers(1, 20),
        max_tokens=st.integers(20, 200),
        seed=st.integers(0, 99),
    )
    def test_packed_steps_of_any_lengths(self, tokens, processes, step, max_tokens, seed):
        """Every record once an epoch, no pack too long, as few packs as one process alone needs."""
        steps = steps_of(
            processes,
            sizes=[len(tokens)],
            tokens=tokens,
            step=step,
            seed=seed,
            plan={"max_packed_tokens": max_tokens},
        )
        drawn = [i for ranks in steps for packs in ranks for i in indices(packs)]
        assert sorted(drawn) == list(range(len(tokens)))
        for ranks in steps:
            for pack in (pack for packs in ranks for pack in packs):
                assert len(pack) == 1 or sum(tokens[draw.index] for draw in pack) <= max_tokens
            shares = [np.array([tokens[i] for i in indices(packs)]) for packs in ranks]
            assert {len(packs) for packs in ranks} == {max(len(cut(share, max_tokens)) for share in shares)}

    @every_plan
    @pytest.mark.parametrize("processes", PROCESSES)
    @pytest.mark.parametrize("strategy", ["random", "sequential"])
    def test_every_record_once_an_epoch(self, processes, strategy, plan):
        steps = steps_of(processes, strategy=strategy, plan=plan)
        drawn = [i for step in steps for packs in step for i in indices(packs)]
        assert sorted(drawn) == list(range(23))

    @every_plan
    @pytest.mark.parametrize("processes", PROCESSES)
    def test_the_steps_follow_the_order_of_the_epoch(self, processes, plan):
        order = epoch_order(SIZES, seed=4, epoch=2).tolist()
        steps = steps_of(processes, epoch=2, seed=4, plan=plan)
        drawn = [{i for packs in step for i in indices(packs)} for step in steps]
        assert drawn == [set(order[0:6]), set(order[6:12]), set(order[12:18]), set(order[18:23])]

    def test_a_plan_changes_packs_and_not_the_records_of_a_step(self):
        epochs = [steps_of(2, seed=4, plan=plan) for plan in PLANS.values()]
        drawn = [[{i for packs in step for i in indices(packs)} for step in steps] for steps in epochs]
        assert all(one == drawn[0] for one in drawn)
        assert all(one != other for one, other in pairwise(epochs))

    def test_one_process_reads_a_step_in_order(self):
        order = epoch_order(SIZES, seed=4, epoch=0).tolist()
        steps = steps_of(1, seed=4, plan=PLANS["three a pack"])
        assert [[[draw.index for draw in pack] for pack in packs] for (packs,) in steps][:2] == [
            [order[0:3], order[3:6]],
            [order[6:9], order[9:12]],
        ]

    def test_sequential_packs_by_hand(self):
        # Costs follow tokens. 900 | 800, 300 | 900 + 300 -> 900, 200 | 800, 300; the second epoch is alike.
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

    @pytest.mark.parametrize("plan", [{}, {"max_packed_tokens": 1}], ids=["one a pack", "packed"])
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
    def test_fillers_of_the_last_step(self, processes, step, sizes, last, plan):
        """Per rank: packs of one record that count, and those with weight zero; all records are alike."""
        ranks = steps_of(processes, step=step, sizes=sizes, tokens=[5] * sum(sizes), plan=plan)[-1]
        assert all(len(pack) == 1 for packs in ranks for pack in packs)
        assert [(len(indices(packs)), len(packs) - len(indices(packs))) for packs in ranks] == last

    @every_plan
    def test_costs_balance_each_step(self, plan):
        steps = steps_of(2, seed=1, plan=plan, step=10)[:2]
        loads = [[sum(TOKENS[i] for i in indices(packs)) for packs in step] for step in steps]
        order = epoch_order(SIZES, seed=1, epoch=0)
        plain = [[TOKENS[order[i : i + 5]].sum() for i in (start, start + 5)] for start in (0, 10)]
        spread, of_plain = (sum(max(load) - min(load) for load in both) for both in (loads, plain))
        assert spread < of_plain / 2

    @every_plan
    def test_epochs(self, plan):
        epochs = [steps_of(1, epoch=epoch, plan=plan) for epoch in range(3)]
        drawn = [{draw.epoch for (packs,) in steps for draw in draws_of(packs)} for steps in epochs]
        assert drawn == [{0}, {1}, {2}]
        orders = [[i for (packs,) in steps for i in indices(packs)] for steps in epochs]
        assert all(a != b for a, b in pairwise(orders))

    @every_plan
    def test_an_epoch_can_be_gone_back_to(self, plan):
        one = sampler(plan=plan)
        first = list(one)
        one.set_epoch(1)
        assert list(one) != first
        one.set_epoch(0)
        assert list(one) == first

    def test_a_change_of_the_epoch_leaves_a_begun_iteration_alone(self):
        one = sampler()
        expected, begun = list(one), iter(one)
        found = [next(begun)]
        one.set_epoch(1)
        assert found + list(begun) == expected

    def test_a_step_by_its_number(self):
        one = sampler(processes=2, rank=1, seed=4)
        parts = [one.step(1, number).tolist() for number in range(4)]
        assert [len(part) for part in parts] == [6, 6, 6, 5]
        assert [i for part in parts for i in part] == epoch_order(SIZES, seed=4, epoch=1).tolist()
        assert one.step(0, 3).tolist() == epoch_order(SIZES, seed=4, epoch=0).tolist()[18:]

    @every_plan
    @pytest.mark.parametrize("rank", [0, 1, 2])
    def test_the_packs_of_a_step_by_its_number(self, rank, plan):
        """What a run that resumes reads is what it would have read."""
        one = sampler(processes=3, rank=rank, seed=4, plan=plan)
        one.set_epoch(2)
        whole = list(one)
        other = sampler(processes=3, rank=rank, seed=4, plan=plan)
        assert [other.packs(2, number) for number in reversed(range(4))] == whole[::-1]
        assert other.epoch == 0

    def test_seed_decides_and_other_randomness_does_not(self):
        np.random.seed(0)
        first = list(sampler(seed=4, plan=PLANS["packed"]))
        np.random.seed(1)
        assert list(sampler(seed=4, plan=PLANS["packed"])) == first
        assert list(sampler(seed=5, plan=PLANS["packed"])) != first
