import math
from itertools import combinations, pairwise

import pytest

from policy_split_jax.data.puzzles import combination, in_turns, shuffled


@pytest.mark.parametrize("size", [0, 1, 3, 5])
def test_ranks_are_the_sets_once(size):
    found = [combination(rank, size) for rank in range(math.comb(7, size))]
    assert sorted(found) == list(combinations(range(7), size))


@pytest.mark.parametrize("count", [1, 2, 16, 17, 1000])
def test_an_order_holds_every_number_once(count):
    assert sorted(shuffled(count, [0])) == list(range(count))


def test_orders_differ_by_seed_and_look_random():
    order = list(shuffled(10_000, [0, 4]))
    assert order == list(shuffled(10_000, [0, 4])) != list(shuffled(10_000, [1, 4]))
    # Means of 1,000 uniform numbers below 10,000: five standard deviations are 456.
    for start in range(0, 10_000, 1000):
        assert sum(order[start : start + 1000]) / 1000 == pytest.approx(5000, abs=456)
    # Neighbours are no nearer than chance: the mean distance is a third of the range, 5 deviations are 118.
    steps = [abs(a - b) for a, b in pairwise(order)]
    assert sum(steps) / len(steps) == pytest.approx(3333, abs=118)


def test_streams_take_turns_and_an_ended_one_leaves_its_turns():
    assert in_turns([iter("ab"), iter("vwxyz")], 6) == ["a", "v", "b", "w", "x", "y"]
    assert in_turns([iter("a"), iter("")], 6) == ["a"]
