"""Development sets dealt to ranks; here they are threads, in test_ranks.py processes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imf_kernels import grids, o3s
from imf_kernels.o3s.metric import Ranks
from imf_kernels.o3s.sharding import Sharded, deal
from tests.o3s.tools import on_ranks

COSTS = st.lists(st.floats(0, 1e4), min_size=1, max_size=30)


@settings(deadline=None, max_examples=100)
@given(COSTS, st.integers(1, 9))
def test_items_are_dealt_once_and_evenly(costs, size):
    shares = deal(costs, size)
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(costs[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs) + 1e-6
    assert deal(costs, 1) == [list(range(len(costs)))]
    assert [len(share) for share in deal([0.0] * 6, 3)] == [2, 2, 2]


@settings(deadline=None, max_examples=40)
@given(COSTS, st.integers(2, 6), st.randoms(use_true_random=False))
def test_the_result_is_that_of_one_rank_to_the_bit(costs, size, random):
    """Values whose float64 sum depends on the order."""
    items = [random.uniform(-1, 1) * 10.0 ** random.randint(-8, 8) for _ in costs]

    def value(ranks):
        metric = Sharded(
            lambda grid, own: [x * float(grid[1]) for x in own], items, costs, o3s.mean, ranks
        )
        return metric(torch.tensor([0.0, 0.3, 1.0]))

    alone = value(Ranks())
    assert alone == sum(x * float(torch.tensor(0.3)) for x in items) / len(items)
    assert on_ranks(size, value) == [alone] * size


@pytest.mark.parametrize("size", [1, 2, 5])
def test_all_ranks_find_what_one_finds(size):
    optimum = [0.21, 0.64, 0.35, 0.58]

    def work(ranks):
        seen = []

        def evaluate(grid, own):
            seen.extend(own)
            return torch.tensor([abs(float(grid[1]) - item) for item in own])

        metric = Sharded(evaluate, optimum, None, o3s.mean, ranks)
        found = o3s.search(metric, 2, higher_is_better=False, method="golden")
        return found, set(seen)

    made = on_ranks(size, work)
    want = work(Ranks())[0]
    assert all(found == want for found, _ in made)
    assert sum(len(seen) for _, seen in made) == 4, "no item twice; the fifth rank has none"


def test_a_reduction_of_the_whole_list():
    """Errors and words of each item: their quotient is no mean of the items' quotients."""
    items = [(1, 10), (0, 2), (7, 9)]

    def rate(pairs):
        assert pairs == items
        return sum(errors for errors, _ in pairs) / sum(words for _, words in pairs)

    def value(ranks):
        return Sharded(lambda grid, own: own, items, None, rate, ranks)(grids.uniform(1))

    assert on_ranks(2, value) == [8 / 21] * 2


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([0.1, 0.2, 0.4]),
        [torch.tensor(0.1), torch.tensor(0.2), torch.tensor(0.4)],
        np.array([0.1, 0.2, 0.4], dtype=np.float32),
        list(np.array([0.1, 0.2, 0.4], dtype=np.float32)),
    ],
    ids=["tensor", "tensors", "array", "scalars"],
)
def test_float32_values_are_reduced_in_float64(values):
    metric = o3s.sharded(lambda grid, own: values, "abc")
    assert metric(grids.uniform(1)) == torch.tensor([0.1, 0.2, 0.4]).double().sum().item() / 3


def test_nan_stays_nan():
    assert math.isnan(o3s.sharded(lambda grid, own: [1.0, math.nan], "ab")(grids.uniform(1)))


def test_a_rank_reads_its_share_only_and_once():
    class Items:
        def __init__(self):
            self.read = []

        def __len__(self):
            return 5

        def __getitem__(self, index):
            self.read.append(index)
            return index

    def work(ranks):
        items = Items()
        metric = Sharded(lambda grid, own: own, items, [5, 1, 1, 1, 2], o3s.mean, ranks)
        assert metric(grids.uniform(1)) == metric(grids.uniform(2)) == 2.0
        return items.read

    assert on_ranks(2, work) == [[0], [1, 2, 3, 4]]


def test_one_rank_reduces_for_all():
    """Whose clock, say, is in the number."""

    def work(ranks):
        metric = Sharded(lambda grid, own: own, [1, 2], None, lambda _: ranks.rank, ranks)
        return metric(grids.uniform(1))

    assert on_ranks(2, work) == [0.0, 0.0]


# -- failures -------------------------------------------------------------------------------------


def test_a_failure_on_one_rank_raises_on_all():
    def work(ranks):
        def evaluate(grid, own):
            if 2 in own:
                raise FloatingPointError("item 2 is silent")
            return own

        return Sharded(evaluate, [1, 2, 3], None, o3s.mean, ranks)(grids.uniform(1))

    made = on_ranks(3, work)
    assert [type(error) for error in made] == [RuntimeError] * 3
    assert {str(error) for error in made} == {"rank 1 of 3: FloatingPointError: item 2 is silent"}
    assert type(made[1].__cause__) is FloatingPointError
    with pytest.raises(FloatingPointError, match="item 2 is silent"):
        work(Ranks())


def test_an_item_that_one_rank_cannot_read_raises_on_all():
    class Broken(list):
        def __getitem__(self, index):
            if index == 1:
                raise OSError("no such recording")
            return super().__getitem__(index)

    def work(ranks):
        return Sharded(lambda grid, own: own, Broken([1, 2, 3]), None, o3s.mean, ranks)

    made = on_ranks(2, work)
    assert {str(error) for error in made} == {"rank 1 of 2: OSError: no such recording"}


def test_other_items_than_on_other_ranks():
    def work(ranks):
        items = [1, 2, 3] if ranks.rank else [1, 2]
        return Sharded(lambda grid, own: own, items, None, o3s.mean, ranks)(grids.uniform(1))

    for error in on_ranks(2, work):
        assert isinstance(error, ValueError)
        assert "items: expected the same list and costs on every rank" in str(error)


def test_another_grid_than_on_other_ranks():
    def work(ranks):
        metric = Sharded(lambda grid, own: own, [1, 2], None, o3s.mean, ranks)
        return metric(torch.tensor([0.0, 0.25 * (1 + ranks.rank), 1.0]))

    for error in on_ranks(2, work):
        assert isinstance(error, ValueError)
        assert "grid: expected the same on every rank, got [0.0, 0.25, 1.0]; " in str(error)


@pytest.mark.parametrize("other", [{"start": "sway"}, {"budget": 2}, {"max_sweeps": 1}])
def test_another_search_than_on_other_ranks(other):
    def work(ranks):
        metric = Sharded(lambda grid, own: own, [1, 2], None, o3s.mean, ranks)
        options = other if ranks.rank else {}
        return o3s.search(metric, 2, higher_is_better=True, tolerance=0.5, **options)

    for error in on_ranks(2, work):
        assert isinstance(error, ValueError)
        assert str(error).startswith("settings: expected the same on every rank, got (SearchResult")


def test_a_callback_that_fails_on_one_rank_raises_on_all():
    def work(ranks):
        def failing(*_):
            raise OSError("no disk")

        metric = Sharded(lambda grid, own: own, [1, 2], None, o3s.mean, ranks)
        options = {"callback": failing} if ranks.rank else {}
        return o3s.search(metric, 2, higher_is_better=True, tolerance=0.5, **options)

    assert {str(error) for error in on_ranks(2, work)} == {"rank 1 of 2: OSError: no disk"}


def test_a_value_for_every_item():
    with pytest.raises(ValueError, match="evaluate: expected 3 values, one an item, got 2"):
        o3s.sharded(lambda grid, own: [1, 2], "abc")(grids.uniform(1))


@pytest.mark.parametrize(
    ("items", "costs", "message"),
    [
        ("", None, "items: expected at least one, got none"),
        ("abc", [1, 2], r"costs: expected 3 numbers >= 0, got \[1, 2\]"),
        ("ab", [1, -2], r"costs: expected 2 numbers >= 0, got \[1, -2\]"),
        ("ab", [1, math.nan], "costs: expected 2 numbers >= 0"),
    ],
)
def test_bad_items_and_costs(items, costs, message):
    with pytest.raises(ValueError, match=message):
        o3s.sharded(lambda grid, own: own, items, costs=costs)
