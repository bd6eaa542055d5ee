"""Results: saved, loaded, resumed, drawn."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imf_kernels import o3s
from tests.o3s.tools import Counted, rugged, rugged_on_grids


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    nfe=st.integers(2, 4),
    budget=st.integers(1, 40),
    method=st.sampled_from(["ternary", "golden"]),
)
def test_resumed_equals_undisturbed(seed, nfe, budget, method):
    options = {"higher_is_better": False, "start": "sway", "max_sweeps": 6, "method": method}
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


def test_files_from_before_golden_sections_are_of_ternary_searches(tmp_path):
    path = tmp_path / "search.json"
    options = {"higher_is_better": True, "tolerance": 0.1}
    whole = o3s.search(rugged_on_grids(4), 3, **options)
    o3s.search(rugged_on_grids(4), 3, budget=6, save_to=path, **options)
    saved = json.loads(path.read_text())
    assert saved.pop("method") == "ternary"
    path.write_text(json.dumps(saved))
    assert o3s.search(rugged_on_grids(4), 3, resume=o3s.SearchResult.load(path), **options) == whole


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
    values = iter([1.0])
    result = o3s.search(lambda grid: next(values, math.nan), 2, higher_is_better=True, save_to=path)
    loaded = o3s.SearchResult.load(path)
    assert [e.grid for e in loaded.evaluations] == [e.grid for e in result.evaluations]
    assert all(math.isnan(e.value) for e in loaded.evaluations[1:])


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
        {"method": "golden"},
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
