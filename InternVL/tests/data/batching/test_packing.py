"""Balancing and bin-packing: worked examples, brute force, and properties of all plans."""

from itertools import product
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_chat.data.batching.packing import StepPlan, StepPlanner, balance_records, bin_pack


def lists(parts) -> list[list[int]]:
    return [part.tolist() for part in parts]


def fewest_packs(tokens: list[int], max_tokens: int) -> int:
    """Return the smallest number of packs by brute force; a longer record gets its own pack."""
    longest_first = sorted((min(n, max_tokens) for n in tokens), reverse=True)
    best = len(tokens)

    def assign(i: int, loads: list[int]) -> None:
        nonlocal best
        if len(loads) >= best:
            return
        if i == len(longest_first):
            best = len(loads)
            return
        for k in range(len(loads)):
            if loads[k] + longest_first[i] <= max_tokens:
                assign(i + 1, [*loads[:k], loads[k] + longest_first[i], *loads[k + 1 :]])
        assign(i + 1, [*loads, longest_first[i]])

    assign(0, [])
    return best


class TestBalanceRecords:
    def test_most_expensive_first_to_the_cheapest_rank(self):
        # 9 | 8; 7 joins 8; 6 joins 9; both have 15: 2 goes to the first, 1 to the second.
        costs = np.array([1, 9, 6, 2, 8, 7])
        assert lists(balance_records(costs, 2)) == [[1, 2, 3], [0, 4, 5]]

    def test_one_expensive_record_outweighs_many_cheap_ones(self):
        assert lists(balance_records(np.array([1.0, 1.0, 1.0, 30.0, 1.0]), 2)) == [[3], [0, 1, 2, 4]]

    def test_equal_counts_limit_each_rank(self):
        assert lists(balance_records(np.array([1, 1, 1, 30]), 2, equal_counts=True)) == [[2, 3], [0, 1]]

    def test_equal_counts_with_a_remainder(self):
        # Capacity 3 and 2: 9 | 8, 8 + 3 | 9, then 9 + 2 = 11 | 11, and 1 to the rank with capacity left.
        assert lists(balance_records(np.array([9, 1, 8, 2, 3]), 2, equal_counts=True)) == [[0, 1, 3], [2, 4]]

    @pytest.mark.parametrize("equal_counts", [True, False])
    def test_a_swap_lowers_the_highest_load(self, equal_counts):
        # The most expensive first: 3 + 2 + 2 | 3 + 2. Swapping the 3 of the first rank for a 2 gives 6 | 6.
        costs = np.array([3, 3, 2, 2, 2])
        assert lists(balance_records(costs, 2, equal_counts=equal_counts)) == [[2, 3, 4], [0, 1]]

    def test_records_without_cost(self):
        assert lists(balance_records(np.zeros(5), 2)) == [[0, 2, 4], [1, 3]]

    @pytest.mark.parametrize("equal_counts", [True, False])
    def test_equal_costs_are_assigned_round_robin(self, equal_counts):
        assigned = balance_records(np.ones(7), 3, equal_counts=equal_counts)
        assert lists(assigned) == [[0, 3, 6], [1, 4], [2, 5]]

    @pytest.mark.parametrize("equal_counts", [True, False])
    def test_a_single_rank_gets_all_records(self, equal_counts):
        assert lists(balance_records(np.array([1, 9, 5]), 1, equal_counts=equal_counts)) == [[0, 1, 2]]

    @pytest.mark.parametrize("equal_counts", [True, False])
    def test_too_few_records(self, equal_counts):
        assert lists(balance_records(np.array([2, 5]), 4, equal_counts=equal_counts)) == [[1], [0], [], []]
        assert lists(balance_records(np.zeros(0), 3, equal_counts=equal_counts)) == [[], [], []]

    @settings(max_examples=150)
    @given(
        costs=st.lists(st.floats(0.5, 1e15) | st.integers(1, 9), max_size=40),
        world_size=st.integers(1, 6),
        equal_counts=st.booleans(),
    )
    def test_every_record_once(self, costs, world_size, equal_counts):
        costs = np.array(costs, np.float64)
        assigned = balance_records(costs, world_size, equal_counts=equal_counts)
        assert len(assigned) == world_size
        assert sorted(np.concatenate(assigned).tolist()) == list(range(len(costs)))
        assert all(positions.tolist() == sorted(positions.tolist()) for positions in assigned)
        assert all(positions.dtype == np.int64 for positions in assigned)
        assert lists(assigned) == lists(balance_records(costs.copy(), world_size, equal_counts=equal_counts))
        if equal_counts:
            sizes = [len(positions) for positions in assigned]
            assert sizes == [len(part) for part in np.array_split(costs, world_size)]

    @settings(max_examples=100)
    @given(costs=st.lists(st.integers(1, 100), min_size=1, max_size=6), world_size=st.integers(1, 3))
    def test_the_largest_load_is_close_to_the_optimum(self, costs, world_size):
        """Most expensive first comes within a third of the optimum (Graham, SIAM J. Appl. Math. 17, 1969)."""
        best = min(
            max(sum(c for c, r in zip(costs, ranks, strict=True) if r == rank) for rank in range(world_size))
            for ranks in product(range(world_size), repeat=len(costs))
        )
        largest = max(
            np.array(costs)[positions].sum() for positions in balance_records(np.array(costs), world_size)
        )
        assert best <= largest <= (4 / 3 - 1 / (3 * world_size)) * best + 1e-9

    @pytest.mark.parametrize("world_size", [2, 4, 8])
    @pytest.mark.parametrize("equal_counts", [True, False])
    def test_costs_are_balanced_better_than_by_an_even_split(self, world_size, equal_counts):
        costs = np.random.default_rng(0).lognormal(6, 1, 128)
        loads = [
            costs[positions].sum()
            for positions in balance_records(costs, world_size, equal_counts=equal_counts)
        ]
        even = [part.sum() for part in np.array_split(costs, world_size)]
        assert max(loads) - min(loads) < 0.2 * (max(even) - min(even))


class TestBinPack:
    @pytest.mark.parametrize(
        ("tokens", "max_tokens", "packs"),
        [
            ([500, 300, 400, 200], 700, [[0, 3], [1, 2]]),  # 500 | 400; 300 to 400; 200 to 500
            ([10, 20, 30], 60, [[0, 1, 2]]),
            ([10, 20, 31], 60, [[2], [0, 1]]),
            ([60, 60], 60, [[0], [1]]),
            ([40, 40, 40], 60, [[0], [1], [2]]),  # the total would fit in two packs
            ([5] * 6, 10, [[0, 3], [1, 4], [2, 5]]),
            ([7], 10, [[0]]),
            ([], 10, []),
            ([25, 4, 3, 2], 10, [[0], [1, 2, 3]]),  # longer than a pack
            ([9, 25, 12], 10, [[1], [2], [0]]),
            ([1000, *[5] * 6], 10, [[0], [1, 4], [2, 5], [3, 6]]),  # its excess length does not add packs
        ],
    )
    def test_by_hand(self, tokens, max_tokens, packs):
        assert lists(bin_pack(np.array(tokens, np.int32), max_tokens)) == packs

    @pytest.mark.parametrize(
        ("min_packs", "packs"),
        [
            (1, [[0, 1, 2, 3]]),
            (2, [[0, 3], [1, 2]]),
            (3, [[0], [1], [2, 3]]),
            (4, [[0], [1], [2], [3]]),
            (9, [[0], [1], [2], [3]]),
        ],
    )
    def test_minimum_number_of_packs(self, min_packs, packs):
        assert lists(bin_pack(np.array([5, 4, 3, 2]), 100, min_packs)) == packs

    @settings(max_examples=200)
    @given(
        tokens=st.lists(st.integers(1, 90), max_size=40),
        max_tokens=st.integers(10, 100),
        min_packs=st.integers(1, 6),
    )
    def test_properties(self, tokens, max_tokens, min_packs):
        tokens = np.array(tokens, np.int32)
        packs = bin_pack(tokens, max_tokens, min_packs)
        assert sorted(i for pack in packs for i in pack) == list(range(len(tokens)))
        assert all(len(pack) and pack.tolist() == sorted(pack.tolist()) for pack in packs)
        assert all(tokens[pack].sum() <= max_tokens or len(pack) == 1 for pack in packs)
        lower_bound = ceil(tokens.clip(max=max_tokens).sum() / max_tokens)
        assert len(packs) >= max(lower_bound, min(min_packs, len(tokens)))
        assert lists(packs) == lists(bin_pack(tokens.copy(), max_tokens, min_packs))

    @settings(max_examples=200)
    @given(tokens=st.lists(st.integers(1, 60), min_size=1, max_size=8), max_tokens=st.integers(5, 60))
    def test_at_most_one_pack_more_than_the_fewest_possible(self, tokens, max_tokens):
        num_packs, fewest = len(bin_pack(np.array(tokens), max_tokens)), fewest_packs(tokens, max_tokens)
        assert fewest <= num_packs <= fewest + 1

    @settings(max_examples=100)
    @given(
        tokens=st.lists(st.integers(1, 80), min_size=1, max_size=30),
        max_tokens=st.integers(20, 60),
        more=st.integers(0, 5),
    )
    def test_exactly_the_requested_number_of_packs(self, tokens, max_tokens, more):
        """Otherwise ranks could end up with different numbers of packs."""
        tokens = np.array(tokens)
        min_packs = min(len(bin_pack(tokens, max_tokens)) + more, len(tokens))
        assert len(bin_pack(tokens, max_tokens, min_packs)) == min_packs

    @settings(max_examples=100)
    @given(tokens=st.lists(st.integers(1, 50), min_size=1, max_size=30), max_tokens=st.integers(50, 200))
    def test_packs_have_similar_lengths(self, tokens, max_tokens):
        """Each record is added to the shortest pack, so packs differ by at most one record."""
        tokens = np.array(tokens)
        loads = [tokens[pack].sum() for pack in bin_pack(tokens, max_tokens)]
        assert max(loads) - min(loads) <= tokens.max()

    def test_realistic_lengths_need_few_extra_packs(self):
        tokens = np.random.default_rng(1).lognormal(6.5, 0.6, 512).astype(np.int32).clip(max=4096)
        assert len(bin_pack(tokens, 8192)) <= ceil(tokens.sum() / 8192) + 1


def check_plan(plan: StepPlan, planner: StepPlanner, records: np.ndarray) -> None:
    """Check that each record occurs once and that packs keep the order of the step."""
    assert len(plan) == planner.world_size
    assert sorted(r for packs in plan for pack in packs for r in pack) == sorted(records.tolist())
    position = {record: i for i, record in enumerate(records.tolist())}
    for pack in (pack for packs in plan for pack in packs):
        positions = [position[record] for record in pack.tolist()]
        assert positions and positions == sorted(positions)


@st.composite
def steps(draw) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens and costs of an epoch, and the records of a step."""
    size = draw(st.integers(1, 40))
    tokens = draw(st.lists(st.integers(1, 90), min_size=size, max_size=size))
    costs = draw(st.lists(st.floats(1.0, 1e14), min_size=size, max_size=size))
    records = draw(st.permutations(range(size)))[: draw(st.integers(1, size))]
    return np.array(tokens, np.int32), np.array(costs), np.array(records)


class TestStepPlanner:
    def test_packing_by_hand(self):
        tokens = np.array([300, 100, 500, 200, 400, 100])
        planner = StepPlanner(2, tokens, tokens, max_packed_tokens=500)
        # 500 (record 2) | 400 (4), 300 (0); 100 (5) joins 500. Neither 600 nor 700 fits in one pack.
        assert [lists(packs) for packs in planner(np.array([5, 2, 0, 4]))] == [[[2], [5]], [[4], [0]]]

    def test_all_ranks_get_the_same_number_of_packs(self):
        tokens, costs = np.array([400, 400, 400, 100, 100, 100]), np.array([6, 2, 2, 5, 3, 2])
        planner = StepPlanner(2, tokens, costs, max_packed_tokens=500)
        # Costs 6 + 2 + 2 | 5 + 3 + 2: one pack would suffice for the second rank.
        assert [lists(packs) for packs in planner(np.arange(6))] == [[[0], [1], [2]], [[3], [4], [5]]]

    def test_fewer_packs_if_there_are_too_few_records(self):
        tokens, costs = np.array([400, 400, 400, 100]), np.array([1, 1, 1, 9])
        planner = StepPlanner(2, tokens, costs, max_packed_tokens=500)
        assert [lists(packs) for packs in planner(np.arange(4))] == [[[3]], [[0], [1], [2]]]

    def test_fixed_number_of_records_per_pack_by_hand(self):
        costs = np.array([9, 1, 8, 2, 3])
        planner = StepPlanner(2, costs[::-1], costs, records_per_pack=2)
        # Capacity 3 and 2: 9 | 8, 8 + 3 | 9, then 9 + 2 = 11 | 11, and 1 to the rank with capacity left.
        assert [lists(packs) for packs in planner(np.array([4, 3, 2, 1, 0]))] == [[[3, 1], [0]], [[4, 2]]]

    @pytest.mark.parametrize(("max_packed_tokens", "expected"), [(None, 12 / 9), (600, 1)])
    def test_load_imbalance_by_hand(self, max_packed_tokens, expected):
        costs = np.array([9, 99, 3, 3, 3])
        planner = StepPlanner(2, costs, costs, max_packed_tokens)
        # Equal counts: 9 + 3 | 3 + 3. Otherwise 9 | 3 + 3 + 3.
        assert planner.load_imbalance(planner(np.array([4, 3, 2, 0]))) == pytest.approx(expected)

    @pytest.mark.parametrize("max_packed_tokens", [None, 600])
    def test_a_single_rank_gets_the_full_step(self, max_packed_tokens):
        tokens = np.array([100, 200, 300, 400, 500])
        planner = StepPlanner(1, tokens, tokens, max_packed_tokens=max_packed_tokens, records_per_pack=2)
        records = np.array([4, 0, 3, 1])
        plan = planner(records)
        check_plan(plan, planner, records)
        # Pairs, or 500 + 100 and 400 + 200: the same here.
        assert [lists(packs) for packs in plan] == [[[4, 0], [3, 1]]]

    @settings(max_examples=200)
    @given(step=steps(), world_size=st.integers(1, 6), max_tokens=st.integers(10, 120))
    def test_packing_properties(self, step, world_size, max_tokens):
        tokens, costs, records = step
        planner = StepPlanner(world_size, tokens, costs, max_packed_tokens=max_tokens)
        plan = planner(records)
        check_plan(plan, planner, records)
        packs = [pack for packs in plan for pack in packs]
        assert all(tokens[pack].sum() <= max_tokens or len(pack) == 1 for pack in packs)
        assert len(packs) >= ceil(tokens[records].clip(max=max_tokens).sum() / max_tokens)
        most = max(len(packs) for packs in plan)
        assert [len(packs) for packs in plan] == [min(most, sum(map(len, packs))) for packs in plan]
        alone = [len(bin_pack(tokens[np.concatenate(packs)], max_tokens)) for packs in plan if packs]
        assert most == max(alone)
        assert [lists(packs) for packs in planner(records.copy())] == [lists(packs) for packs in plan]

    @settings(max_examples=100)
    @given(step=steps(), world_size=st.integers(1, 6), size=st.integers(1, 5))
    def test_fixed_number_properties(self, step, world_size, size):
        tokens, costs, records = step
        planner = StepPlanner(world_size, tokens, costs, records_per_pack=size)
        plan = planner(records)
        check_plan(plan, planner, records)
        counts = [sum(len(pack) for pack in packs) for packs in plan]
        assert counts == [len(part) for part in np.array_split(records, world_size)]
        assert all(len(pack) == size for packs in plan for pack in packs[:-1])
        assert [len(packs) for packs in plan] == [ceil(number / size) for number in counts]

    @settings(max_examples=50)
    @given(step=steps(), world_size=st.integers(1, 4), seed=st.integers(0, 99))
    def test_other_steps_do_not_affect_the_plan(self, step, world_size, seed):
        tokens, costs, records = step
        plan = StepPlanner(world_size, tokens, costs, max_packed_tokens=100)(records)
        others = np.setdiff1d(np.arange(len(tokens)), records)
        tokens[others] = np.random.default_rng(seed).integers(1, 200, len(others))
        costs[others] = 1.0
        again = StepPlanner(world_size, tokens, costs, max_packed_tokens=100)(records)
        assert [lists(packs) for packs in again] == [lists(packs) for packs in plan]

    @pytest.mark.parametrize("max_packed_tokens", [None, 16384])
    @pytest.mark.parametrize("world_size", [2, 4, 8])
    def test_ranks_have_similar_loads(self, world_size, max_packed_tokens):
        tokens = np.random.default_rng(2).lognormal(7, 0.7, 256).astype(np.int64)
        costs = tokens * 1e9 + tokens**2 * 1e5
        plan = StepPlanner(world_size, tokens, costs, max_packed_tokens=max_packed_tokens)(np.arange(256))
        loads = [costs[np.concatenate(packs)].sum() for packs in plan]
        even = [part.sum() for part in np.array_split(costs, world_size)]
        assert max(loads) / np.mean(loads) < 1.02
        assert max(loads) - min(loads) < (max(even) - min(even)) / 2

    @pytest.mark.parametrize("records", [np.array([3, 1, 2]), [3, 1, 2], (3, 2, 1)])
    def test_shortest_record_of_a_step(self, records):
        tokens = np.array([5, 70, 30, 60])
        assert StepPlanner(2, tokens, -tokens).shortest(records) == 2
        assert isinstance(StepPlanner(2, tokens, tokens).shortest(records), int)
