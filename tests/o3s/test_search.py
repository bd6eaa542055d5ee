"""What holds of every search: its order, its end, its budget."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imf_kernels import grids, o3s
from tests.o3s.tools import CURVES, Counted, rugged, rugged_on_grids, separable

METHODS = st.sampled_from(["ternary", "golden"])


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    nfe=st.integers(1, 5),
    higher=st.booleans(),
    start=st.sampled_from(list(grids.NAMED)),
    tolerance=st.sampled_from([0.1, 0.02]),
    min_gap=st.sampled_from([1e-3, 0.004]),
    budget=st.none() | st.integers(1, 60),
    method=METHODS,
)
@example(0, 1, True, "uniform", 0.02, 1e-3, 1, "ternary")
def test_on_any_metric(seed, nfe, higher, start, tolerance, min_gap, budget, method):
    metric = Counted(rugged(seed))
    result = o3s.search(
        metric,
        nfe,
        higher_is_better=higher,
        start=start,
        method=method,
        tolerance=tolerance,
        min_gap=min_gap,
        budget=budget,
        max_sweeps=8,
    )
    first = grids.make(start, nfe)
    values = [e.value for e in result.evaluations]
    assert [e.grid for e in result.evaluations] == metric.asked
    assert metric.asked[0] == tuple(first.tolist())
    assert result.value == (max(values) if higher else min(values))
    assert result.best.value == rugged(seed)(result.grid[1:-1].tolist())
    for grid in metric.asked:
        checked = grids.validate(grid)
        assert checked.diff().min() >= min_gap - 1e-7
    if budget is not None:
        assert len(values) <= budget
    assert (result.stopped == "budget") <= (len(values) == budget)


@pytest.mark.parametrize("higher", [False, True])
def test_min_gap_where_the_optimum_is_none(higher):
    """All positions pull to one end and stop at the gap."""
    metric = Counted(sum)
    result = o3s.search(metric, 3, higher_is_better=higher, tolerance=0.01, min_gap=0.06)
    for grid in metric.asked:
        assert torch.tensor(grid).diff().min() >= 0.06 - 1e-7
    want = torch.tensor([0.88, 0.94] if higher else [0.06, 0.12])
    assert (result.grid[1:-1] - want).abs().max() <= 0.02


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), nfe=st.integers(2, 4), method=METHODS)
def test_converged_grid_is_a_fixed_point(seed, nfe, method):
    """No position search from it brings anything."""
    options = {"higher_is_better": False, "tolerance": 0.1, "method": method}
    result = o3s.search(rugged_on_grids(seed), nfe, **options)
    assert result.stopped == "converged"
    again = o3s.search(rugged_on_grids(seed), nfe, start=result.grid, **options)
    assert again.best == again.evaluations[0]
    assert again.value == result.value


def test_one_position_moves_at_a_time():
    result = o3s.search(rugged_on_grids(3), 4, higher_is_better=True, max_sweeps=3)
    best = result.evaluations[0]
    assert (best.sweep, best.position) == (None, None)
    order = []
    for evaluation in result.evaluations[1:]:
        moved = [k for k in range(5) if evaluation.grid[k] != best.grid[k]]
        place = (evaluation.sweep, evaluation.position)
        if order and place != order[-1]:
            upto = result.evaluations[: result.evaluations.index(evaluation)]
            best = max(upto, key=lambda e: e.value)
            moved = [k for k in range(5) if evaluation.grid[k] != best.grid[k]]
        assert moved == [evaluation.position]
        if not order or place != order[-1]:
            order.append(place)
    assert order[:3] == [(0, 3), (0, 2), (0, 1)]


def test_nfe_1_evaluates_the_start_alone():
    metric = Counted(lambda inner: 7.0)
    result = o3s.search(metric, 1, higher_is_better=True)
    assert metric.asked == [(0.0, 1.0)]
    assert result.grid.tolist() == [0.0, 1.0]
    assert (result.value, result.stopped) == (7.0, "converged")


@pytest.mark.parametrize(("nfe", "sweeps"), [(2, 2), (3, 2), (4, 2), (6, 2)])
def test_stops_after_n_position_searches_in_vain(nfe, sweeps):
    """n - 1 positions a sweep: n searches in vain end in the second, for n = 2 with it."""

    def run(max_sweeps):
        return o3s.search(lambda grid: 1.0, nfe, higher_is_better=True, max_sweeps=max_sweeps)

    assert run(sweeps - 1).stopped == "sweeps"
    assert run(sweeps).stopped == "converged"
    assert run(None).best == run(None).evaluations[0]


def test_an_improvement_starts_the_count_anew():
    """Improvements cease with sweep k: the search ends in sweep k + 1 or k + 2."""
    metric = Counted(separable(CURVES["quadratic"], [0.02, 0.05, 0.1]))
    result = o3s.search(metric, 4, higher_is_better=False, tolerance=0.005)
    better = [
        e
        for k, e in enumerate(result.evaluations[1:], 1)
        if e.value < min(other.value for other in result.evaluations[:k])
    ]
    last = better[-1].sweep
    assert last >= 2
    for sweeps, stopped in [(last, "sweeps"), (last + 1, "sweeps"), (last + 3, "converged")]:
        metric = Counted(separable(CURVES["quadratic"], [0.02, 0.05, 0.1]))
        again = o3s.search(metric, 4, higher_is_better=False, tolerance=0.005, max_sweeps=sweeps)
        assert again.stopped == stopped


@pytest.mark.parametrize("budget", [1, 2, 5, 17])
def test_budget(budget):
    metric = Counted(rugged(1))
    result = o3s.search(metric, 4, higher_is_better=True, budget=budget)
    assert len(metric.asked) == len(result.evaluations) == budget
    assert result.stopped == "budget"


def test_budget_that_just_suffices():
    whole = o3s.search(rugged_on_grids(2), 3, higher_is_better=True)
    paid = len(whole.evaluations)
    assert o3s.search(rugged_on_grids(2), 3, higher_is_better=True, budget=paid) == whole


def test_callback_sees_every_paid_evaluation():
    seen = []

    def callback(evaluation, result):
        assert result.evaluations[-1] is evaluation
        assert result.stopped == "running"
        seen.append(evaluation)

    result = o3s.search(rugged_on_grids(2), 3, higher_is_better=True, callback=callback)
    assert seen == result.evaluations


def test_tiny_gains_do_not_keep_the_sweeps_going():
    """Positions that pull at each other: the search creeps, unless gains must be worth it."""

    def coupled(inner):
        return (inner[0] - 0.5 * inner[1]) ** 2 + (inner[1] - 0.9 * inner[0] - 0.1) ** 2

    runs = {
        gain: o3s.search(
            Counted(coupled), 3, higher_is_better=False, tolerance=0.01, min_gain=gain, budget=2000
        )
        for gain in (0.0, 1e-4)
    }
    assert len(runs[1e-4].evaluations) < len(runs[0.0].evaluations)
    assert runs[1e-4].value <= runs[0.0].value + 1e-3
    assert runs[1e-4].stopped == "converged"
