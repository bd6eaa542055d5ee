"""Where a search ends, and what it pays, for both ways of narrowing a bracket."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imf_kernels import o3s
from tests.o3s.tools import CURVES, Counted, separable

METHODS = pytest.mark.parametrize("method", ["ternary", "golden"])
TOLERANCE = 0.02


@METHODS
@pytest.mark.parametrize("higher", [False, True])
@pytest.mark.parametrize("curve", list(CURVES))
@settings(deadline=None, max_examples=25)
@given(data=st.data(), nfe=st.integers(2, 4))
def test_finds_the_optimum_of_convex_and_plateaued_metrics(method, curve, higher, data, nfe):
    """No position could gain more than by moving within the tolerance of its optimum.

    Golden sections are closer to each other than thirds: both may be on one step of a metric that
    has steps, beside the best."""
    gaps = data.draw(st.lists(st.floats(0.2, 1.0), min_size=nfe, max_size=nfe))
    optimum = [sum(gaps[: k + 1]) / sum(gaps) for k in range(nfe - 1)]
    cost = CURVES[curve]
    loss = separable(cost, optimum)
    metric = Counted((lambda inner: -loss(inner)) if higher else loss)
    result = o3s.search(metric, nfe, method=method, higher_is_better=higher, tolerance=TOLERANCE)
    assert result.stopped == "converged"
    assert result.value == metric.metric(result.grid[1:-1].tolist())
    good_enough = max(cost(-TOLERANCE), cost(TOLERANCE)) + 1e-6
    if curve == "rounded" and method == "golden":
        good_enough += 0.1
    for time, best in zip(result.grid[1:-1].tolist(), optimum, strict=True):
        assert cost(time - best) <= good_enough


@METHODS
@pytest.mark.parametrize("tolerance", [0.1, 0.01, 1e-3])
def test_tolerance_bounds_the_distance_to_the_optimum(method, tolerance):
    metric = Counted(separable(CURVES["quadratic"], [0.123, 0.456, 0.789]))
    result = o3s.search(metric, 4, method=method, higher_is_better=False, tolerance=tolerance)
    error = (result.grid[1:-1] - torch.tensor([0.123, 0.456, 0.789])).abs().max()
    assert error <= tolerance


@pytest.mark.parametrize("tolerance", [0.1, 0.02, 1e-3, 1e-5])
@pytest.mark.parametrize("optimum", [0.123, 0.31, 0.876])
def test_evaluations_are_those_of_theory(tolerance, optimum):
    """Of one position: 2 for every 2/3 of the bracket and its centre, or 1 for every .618 and one
    more to begin with; the start beside."""
    width, paid = 1 - 2e-3, {}
    options = {"start": [0, 0.51, 1], "tolerance": tolerance, "max_sweeps": 1}
    for method in ("ternary", "golden"):
        metric = Counted(separable(CURVES["quadratic"], [optimum]))
        result = o3s.search(metric, 2, higher_is_better=False, method=method, **options)
        assert abs(float(result.grid[1]) - optimum) <= tolerance
        paid[method] = len(metric.asked)
    narrowings = {
        name: math.ceil(math.log(width / tolerance) / math.log(factor))
        for name, factor in (("ternary", 3 / 2), ("golden", (1 + math.sqrt(5)) / 2))
    }
    twos = 2 * narrowings["ternary"]
    assert paid["ternary"] in (1 + twos, 1 + twos + 1), "the centre may be known"
    assert paid["golden"] == 1 + narrowings["golden"] + 1


@pytest.mark.parametrize("tolerance", [0.02, 1e-3])
def test_a_whole_search_by_golden_sections_costs_half(tolerance):
    paid = {}
    for method in ("ternary", "golden"):
        metric = Counted(separable(CURVES["quadratic"], [0.123, 0.456, 0.789]))
        o3s.search(metric, 4, higher_is_better=False, method=method, tolerance=tolerance)
        paid[method] = len(metric.asked)
    assert paid["ternary"] > 1.9 * paid["golden"]


@METHODS
def test_a_tolerance_below_float32(method):
    metric = Counted(separable(CURVES["quadratic"], [0.3]))
    result = o3s.search(metric, 2, method=method, higher_is_better=False, tolerance=1e-12)
    assert result.stopped == "converged"
    assert abs(result.grid[1] - 0.3) <= 1e-6


@METHODS
@pytest.mark.parametrize("optimum", [[0.02, 0.05], [0.9, 0.97], [0.05, 0.95]])
def test_optimum_far_from_the_start_takes_sweeps(method, optimum):
    metric = Counted(separable(CURVES["quadratic"], optimum))
    result = o3s.search(metric, 3, method=method, higher_is_better=False, tolerance=0.005)
    assert (result.grid[1:-1] - torch.tensor(optimum)).abs().max() <= 0.005
    assert max(e.sweep for e in result.evaluations[1:]) >= 1


@METHODS
def test_start_on_a_plateau_edge(method):
    """Both thirds worse and equal: the bracket closes around the best point known."""

    def well(inner):
        return abs(inner[0] - 0.9) if abs(inner[0] - 0.9) < 0.08 else 1.0

    result = o3s.search(
        Counted(well), 2, method=method, higher_is_better=False, start=[0, 0.95, 1], tolerance=0.01
    )
    assert result.value <= 0.01


@METHODS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_start_on_a_plateau_of_the_worst(method, bad):
    def well(inner):
        return abs(inner[0] - 0.9) if abs(inner[0] - 0.9) < 0.08 else bad

    result = o3s.search(
        Counted(well), 2, method=method, higher_is_better=False, start=[0, 0.95, 1], tolerance=0.01
    )
    assert result.value <= 0.01


@METHODS
@pytest.mark.parametrize("higher", [False, True])
def test_nan_counts_as_worst(method, higher):
    sign = -1 if higher else 1

    def partly(inner):
        return math.nan if inner[0] > 0.55 else sign * abs(inner[0] - 0.4)

    result = o3s.search(Counted(partly), 2, method=method, higher_is_better=higher, tolerance=0.01)
    assert any(math.isnan(evaluation.value) for evaluation in result.evaluations)
    assert abs(result.value) <= 0.01


def test_nan_for_the_start_is_an_error():
    with pytest.raises(ValueError, match=r"metric: .* for the start \[0.0, 0.5, 1.0\], got nan"):
        o3s.search(lambda grid: math.nan, 2, higher_is_better=True)
