import itertools
import json
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imf_kernels import grids, o3s
from tests.flows import FLOWS, GUIDED, Linear

TOLERANCE = 0.02


class Counted:
    """A metric that refuses to be asked twice for the same grid."""

    def __init__(self, metric):
        self.metric, self.asked = metric, []

    def __call__(self, grid):
        assert isinstance(grid, torch.Tensor)
        assert grid.dtype == torch.float32
        assert grid.device.type == "cpu"
        times = tuple(grid.tolist())
        assert times not in self.asked, "paid twice"
        self.asked.append(times)
        return self.metric(times[1:-1])


def separable(cost, optimum):
    """A sum of one convex curve per position."""
    return lambda inner: sum(cost(t - a) for t, a in zip(inner, optimum, strict=True))


def asymmetric(d):
    return 3 * d if d > 0 else -d


CURVES = {
    "quadratic": lambda d: d * d,
    "absolute": abs,
    "steep after": asymmetric,
    "steep before": lambda d: asymmetric(-d),
    "flat bottom": lambda d: max(abs(d) - 0.05, 0.0),
    "wide flat bottom": lambda d: max(abs(d) - 0.2, 0.0),
    "rounded": lambda d: round(abs(d), 1),
}


def rugged(seed):
    """A metric without any structure, the same for the same grid."""
    generator = torch.Generator().manual_seed(seed)
    waves = torch.randn(4, 8, generator=generator, dtype=torch.float64) * 20

    def metric(inner):
        t = torch.zeros(8, dtype=torch.float64)
        t[: len(inner)] = torch.tensor(inner, dtype=torch.float64)
        return float(torch.sin(waves @ t).sum())

    return metric


# -- the optimum ----------------------------------------------------------------------------------


@pytest.mark.parametrize("higher", [False, True])
@pytest.mark.parametrize("curve", list(CURVES))
@settings(deadline=None, max_examples=25)
@given(data=st.data(), nfe=st.integers(2, 4))
def test_finds_the_optimum_of_convex_and_plateaued_metrics(curve, higher, data, nfe):
    """No position could gain more than by moving within the tolerance of its optimum."""
    gaps = data.draw(st.lists(st.floats(0.2, 1.0), min_size=nfe, max_size=nfe))
    optimum = [sum(gaps[: k + 1]) / sum(gaps) for k in range(nfe - 1)]
    cost = CURVES[curve]
    loss = separable(cost, optimum)
    metric = Counted((lambda inner: -loss(inner)) if higher else loss)
    result = o3s.search(metric, nfe, higher_is_better=higher, tolerance=TOLERANCE)
    assert result.stopped == "converged"
    assert result.value == metric.metric(result.grid[1:-1].tolist())
    good_enough = max(cost(-TOLERANCE), cost(TOLERANCE)) + 1e-6
    for time, best in zip(result.grid[1:-1].tolist(), optimum, strict=True):
        assert cost(time - best) <= good_enough


@pytest.mark.parametrize("tolerance", [0.1, 0.01, 1e-3])
def test_tolerance_bounds_the_distance_to_the_optimum(tolerance):
    metric = Counted(separable(CURVES["quadratic"], [0.123, 0.456, 0.789]))
    result = o3s.search(metric, 4, higher_is_better=False, tolerance=tolerance)
    error = (result.grid[1:-1] - torch.tensor([0.123, 0.456, 0.789])).abs().max()
    assert error <= tolerance


def test_cost_grows_with_the_logarithm_of_the_tolerance():
    calls = []
    for tolerance in (1e-2, 1e-4):
        metric = Counted(separable(CURVES["quadratic"], [0.3]))
        o3s.search(metric, 2, higher_is_better=False, tolerance=tolerance)
        calls.append(len(metric.asked))
    assert calls[0] <= 1 + 2 * 12 + 1
    assert calls[1] <= 2 * calls[0]


@pytest.mark.parametrize("optimum", [[0.02, 0.05], [0.9, 0.97], [0.05, 0.95]])
def test_optimum_far_from_the_start_takes_sweeps(optimum):
    metric = Counted(separable(CURVES["quadratic"], optimum))
    result = o3s.search(metric, 3, higher_is_better=False, tolerance=0.005)
    assert (result.grid[1:-1] - torch.tensor(optimum)).abs().max() <= 0.005
    assert max(e.sweep for e in result.evaluations[1:]) >= 1


def test_start_on_a_plateau_edge():
    """Both thirds worse and equal: the bracket closes around the best point known."""

    def well(inner):
        return abs(inner[0] - 0.9) if abs(inner[0] - 0.9) < 0.08 else 1.0

    result = o3s.search(
        Counted(well), 2, higher_is_better=False, start=[0, 0.95, 1], tolerance=0.01
    )
    assert result.value <= 0.01


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_start_on_a_plateau_of_the_worst(bad):
    def well(inner):
        return abs(inner[0] - 0.9) if abs(inner[0] - 0.9) < 0.08 else bad

    result = o3s.search(
        Counted(well), 2, higher_is_better=False, start=[0, 0.95, 1], tolerance=0.01
    )
    assert result.value <= 0.01


# -- never worse, never twice, never too close ----------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    nfe=st.integers(1, 5),
    higher=st.booleans(),
    start=st.sampled_from(list(grids.NAMED)),
    tolerance=st.sampled_from([0.1, 0.02]),
    min_gap=st.sampled_from([1e-3, 0.004]),
    budget=st.none() | st.integers(1, 60),
)
@example(seed=0, nfe=1, higher=True, start="uniform", tolerance=0.02, min_gap=1e-3, budget=1)
def test_on_any_metric(seed, nfe, higher, start, tolerance, min_gap, budget):
    metric = Counted(rugged(seed))
    result = o3s.search(
        metric,
        nfe,
        higher_is_better=higher,
        start=start,
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
@given(seed=st.integers(0, 10_000), nfe=st.integers(2, 4))
def test_converged_grid_is_a_fixed_point(seed, nfe):
    """No position search from it brings anything."""
    options = {"higher_is_better": False, "tolerance": 0.1}
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


def rugged_on_grids(seed):
    metric = rugged(seed)
    return lambda grid: metric(grid.tolist()[1:-1])


def test_nfe_1_evaluates_the_start_alone():
    metric = Counted(lambda inner: 7.0)
    result = o3s.search(metric, 1, higher_is_better=True)
    assert metric.asked == [(0.0, 1.0)]
    assert result.grid.tolist() == [0.0, 1.0]
    assert (result.value, result.stopped) == (7.0, "converged")


# -- when it stops --------------------------------------------------------------------------------


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


# -- not a number ---------------------------------------------------------------------------------


@pytest.mark.parametrize("higher", [False, True])
def test_nan_counts_as_worst(higher):
    result = o3s.search(lambda grid: math.nan, 3, higher_is_better=higher)
    assert result.stopped == "converged"
    assert result.grid.tolist() == grids.uniform(3).tolist()
    assert math.isnan(result.value)

    sign = -1 if higher else 1

    def partly(inner):
        return math.nan if inner[0] > 0.45 else sign * abs(inner[0] - 0.4)

    result = o3s.search(Counted(partly), 2, higher_is_better=higher, tolerance=0.01)
    assert math.isnan(result.evaluations[0].value)
    assert abs(result.value) <= 0.01


# -- saved and resumed ----------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), nfe=st.integers(2, 4), budget=st.integers(1, 40))
def test_resumed_equals_undisturbed(seed, nfe, budget):
    options = {"higher_is_better": False, "start": "sway", "max_sweeps": 6}
    whole = o3s.search(Counted(rugged(seed)), nfe, **options)
    metric = Counted(rugged(seed))  # refuses grids that the first part has paid
    part = o3s.search(metric, nfe, budget=budget, **options)
    before = len(part.evaluations)
    resumed = o3s.search(metric, nfe, resume=part, **options)
    assert resumed == whole
    assert len(part.evaluations) == before, "the result resumed from is left alone"
    assert o3s.search(metric, nfe, resume=resumed, **options) == whole


def test_budget_counts_what_was_resumed():
    metric = Counted(rugged(0))
    part = o3s.search(metric, 3, higher_is_better=True, budget=5)
    result = o3s.search(metric, 3, higher_is_better=True, budget=8, resume=part)
    assert len(result.evaluations) == len(metric.asked) == 8
    same = o3s.search(metric, 3, higher_is_better=True, budget=3, resume=part)
    assert same.evaluations == part.evaluations
    assert same.stopped == "budget"


def test_save_and_load(tmp_path):
    result = o3s.search(rugged_on_grids(4), 3, higher_is_better=True, start=[0, 0.1, 0.7, 1])
    path = tmp_path / "search.json"
    result.save(path)
    loaded = o3s.SearchResult.load(str(path))
    assert loaded == result
    assert loaded.best == result.best
    assert torch.equal(loaded.grid, result.grid)
    assert json.loads(path.read_text())["nfe"] == 3
    assert list(tmp_path.iterdir()) == [path], "no temporary file stays"


def test_save_is_atomic(tmp_path):
    path = tmp_path / "search.json"
    result = o3s.search(lambda grid: 1.0, 2, higher_is_better=True, save_to=path)
    old = path.read_text()
    with path.open() as reader:
        result.stopped = "budget"
        result.save(path)
        assert reader.read() == old, "who reads meanwhile sees the old file"
    assert '"budget"' in path.read_text()

    result.stopped = object()
    with pytest.raises(TypeError):
        result.save(path)
    assert '"budget"' in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


def test_save_and_load_of_nan(tmp_path):
    path = tmp_path / "search.json"
    result = o3s.search(lambda grid: math.nan, 2, higher_is_better=True, save_to=path)
    loaded = o3s.SearchResult.load(path)
    assert [e.grid for e in loaded.evaluations] == [e.grid for e in result.evaluations]
    assert all(math.isnan(e.value) for e in loaded.evaluations)


def test_saved_after_every_evaluation_and_resumed_after_a_crash(tmp_path):
    path = tmp_path / "search.json"
    options = {"higher_is_better": True, "tolerance": 0.1, "max_sweeps": 2}
    whole = o3s.search(rugged_on_grids(5), 3, **options)
    metric, calls = rugged_on_grids(5), []

    def crashing(grid):
        if calls:
            assert len(o3s.SearchResult.load(path).evaluations) == len(calls)
        if len(calls) == 7:
            raise RuntimeError("out of memory")
        calls.append(grid)
        return metric(grid)

    with pytest.raises(RuntimeError, match="out of memory"):
        o3s.search(crashing, 3, save_to=path, **options)
    saved = o3s.SearchResult.load(path)
    assert len(saved.evaluations) == 7
    assert saved.stopped == "running"
    result = o3s.search(metric, 3, resume=saved, save_to=path, **options)
    assert result == whole
    assert o3s.SearchResult.load(path) == whole


@pytest.mark.parametrize(
    "other",
    [
        {"nfe": 4},
        {"higher_is_better": False},
        {"start": "sway"},
        {"tolerance": 0.01},
        {"min_gap": 2e-3},
        {"min_gain": 0.1},
    ],
)
def test_resume_with_other_settings_is_refused(other):
    settings = {"nfe": 3, "higher_is_better": True}
    part = o3s.search(lambda grid: 1.0, budget=2, **settings)
    with pytest.raises(ValueError, match="resume: expected a search with the settings of"):
        o3s.search(lambda grid: 1.0, resume=part, **(settings | other))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "{}",
        '{"start": [0, 1], "evaluations": [{"grid": [0, 1]}]}',
        '{"start": [0, 1], "evaluations": [], "colour": "red"}',
    ],
)
def test_load_of_something_else_names_the_file(tmp_path, text):
    path = tmp_path / "search.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"path: expected a saved O3S search, got .*search\.json"):
        o3s.SearchResult.load(path)


def test_load_of_bytes_names_the_file(tmp_path):
    path = tmp_path / "search.json"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match=r"path: expected a saved O3S search, got .*search\.json"):
        o3s.SearchResult.load(path)


@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_plot(tmp_path, nfe):
    pytest.importorskip("matplotlib")
    path = tmp_path / "search.png"
    result = o3s.search(rugged_on_grids(1), nfe, higher_is_better=True, budget=12)
    figure = result.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert len(figure.axes) == nfe - 1
    for position, axes in enumerate(figure.axes, 1):
        tried = sum(e.position == position for e in result.evaluations)
        assert len(axes.collections[0].get_offsets()) == tried
    path.unlink()
    result.plot()
    assert not path.exists()


# -- on flows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("nfe", [2, 3])
@pytest.mark.parametrize("w", [None, 2.0])
def test_searched_grid_beats_the_uniform_one(nfe, w):
    """An Euler teacher of few steps, against the exact end of its flow."""
    guided = GUIDED["gaussian"]
    model, flow = (FLOWS["gaussian"],) * 2 if w is None else (guided, guided.at(w))
    noise = torch.randn(32, 4, 2, dtype=torch.float64)
    cond = model.prepare(torch.full((32,), 4), guided=w is not None)
    want = flow.carry(noise, noise.new_zeros(32), noise.new_ones(32))
    metric = o3s.on_samples(
        model, noise, cond, lambda x: float((x - want).square().mean().sqrt()), guidance=w
    )
    result = o3s.search(metric, nfe, higher_is_better=False, tolerance=0.05, max_sweeps=4)
    assert result.value < 0.9 * metric(grids.uniform(nfe))
    assert metric(result.grid) == result.value, "the same noise for every grid"
    inner = itertools.combinations([k / 16 for k in range(1, 16)], nfe - 1)
    assert result.value <= min(metric([0.0, *times, 1.0]) for times in inner) + 1e-3


def test_a_flow_without_curvature_has_nothing_to_gain():
    flow, noise = Linear(0.0, 1.0), torch.zeros(1, 1, 1)
    metric = o3s.on_samples(flow, noise, None, lambda x: round(float(x), 5))
    result = o3s.search(metric, 3, higher_is_better=True)
    assert torch.equal(result.grid, grids.uniform(3))


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
