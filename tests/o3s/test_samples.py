"""Metrics of samples: on flows of closed form, whole and in batches."""

import itertools
from dataclasses import replace

import pytest
import torch

from imf_kernels import grids, o3s, seeds
from imf_kernels.graphs import GraphSampler
from imf_kernels.objectives import Batch
from imf_kernels.sampler import sample
from tests.flows import FLOWS, GUIDED, Linear
from tests.graphs.tape import TapeSlot
from tests.models.tools import conditions, small_model


@pytest.mark.parametrize("method", ["ternary", "golden"])
@pytest.mark.parametrize("nfe", [2, 3])
@pytest.mark.parametrize("w", [None, 2.0])
def test_searched_grid_beats_the_uniform_one(method, nfe, w):
    """An Euler teacher of few steps, against the exact end of its flow."""
    guided = GUIDED["gaussian"]
    model, flow = (FLOWS["gaussian"],) * 2 if w is None else (guided, guided.at(w))
    noise = torch.randn(32, 4, 2, dtype=torch.float64)
    cond = model.prepare(torch.full((32,), 4), guided=w is not None)
    want = flow.carry(noise, noise.new_zeros(32), noise.new_ones(32))
    metric = o3s.on_samples(
        model, noise, cond, lambda x: float((x - want).square().mean().sqrt()), guidance=w
    )
    options = {"tolerance": 0.05, "max_sweeps": 4, "method": method}
    result = o3s.search(metric, nfe, higher_is_better=False, **options)
    assert result.value < 0.9 * metric(grids.uniform(nfe))
    assert metric(result.grid) == result.value, "the same noise for every grid"
    inner = itertools.combinations([k / 16 for k in range(1, 16)], nfe - 1)
    assert result.value <= min(metric([0.0, *times, 1.0]) for times in inner) + 1e-3


def test_a_flow_without_curvature_has_nothing_to_gain():
    flow, noise = Linear(0.0, 1.0), torch.zeros(1, 1, 1)
    metric = o3s.on_samples(flow, noise, None, lambda x: round(float(x), 5))
    result = o3s.search(metric, 3, higher_is_better=True)
    assert torch.equal(result.grid, grids.uniform(3))


# -- batches --------------------------------------------------------------------------------------

LENGTHS = [[30, 12], [9], [21, 17, 5]]


def distance(mel, want):
    return (mel - want).square().mean(dim=(1, 2))


@pytest.fixture
def model():
    return small_model("cosyvoice3").student().eval()


def dev_set(model, guided=False):
    batches = []
    for seed, lengths in enumerate(LENGTHS):
        noise = torch.randn(len(lengths), max(lengths), 12)
        cond = model.prepare(**conditions(model, lengths, seed), guided=guided)
        fine = sample(model, noise, cond, nfe=8, guidance=2.0 if guided else None)
        batches.append(o3s.DevBatch(noise, cond, fine))
    return batches


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_batches_count_by_rows(model, guidance):
    batches, grid = dev_set(model, guided=guidance is not None), torch.tensor([0.0, 0.3, 1.0])
    rows = []
    for batch in batches:
        mel = sample(model, batch.noise, batch.cond, grid, guidance=guidance)
        rows += distance(mel, batch.reference).tolist()
    metric = o3s.on_batches(model, batches, distance, guidance=guidance)
    assert metric(grid) == o3s.mean(rows)
    worst = o3s.on_batches(model, batches, distance, guidance=guidance, reduce=max)
    assert worst(grid) == max(rows)
    whole = o3s.on_batches(
        model, batches, lambda *given: float(distance(*given).sum()), guidance=guidance, reduce=sum
    )
    assert whole(grid) == pytest.approx(sum(rows), rel=1e-6)


def test_batches_through_one_graph(model, monkeypatch):
    monkeypatch.setattr("imf_kernels.graphs.runtime.slot_on", TapeSlot)
    batches, grid = dev_set(model), grids.sway(2)
    with GraphSampler(model, 2, [(4, 32)]) as sampler:
        got = o3s.on_batches(sampler, batches, distance)(grid)
        assert sampler.stats().hits == len(batches)
    assert got == pytest.approx(o3s.on_batches(model, batches, distance)(grid), rel=1e-4)


def test_a_value_for_every_row(model):
    metric = o3s.on_batches(model, dev_set(model), lambda mel, want: [1.0, 2.0])
    with pytest.raises(ValueError, match="metric: expected 1 values, one a row, got 2"):
        metric(grids.uniform(1))


# -- the whole ------------------------------------------------------------------------------------


def batches_of(model):
    made = []
    for seed, lengths in enumerate(LENGTHS):
        given = conditions(model, lengths, seed)
        lengths = given.pop("lengths")
        made.append(Batch(torch.randn(len(lengths), max(lengths), 12), lengths, given))
    return made


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_find_grid_is_the_search_that_one_would_write(model, tmp_path, guidance):
    batches, solves = batches_of(model), []

    def to_data(mel, batch):
        solves.append(batch)
        return distance(mel, batch.x1)

    given = {
        "higher_is_better": False,
        "method": "golden",
        "tolerance": 0.1,
        "max_sweeps": 1,
    }
    helped = given | {"folder": tmp_path / "o3s", "name": "to data", "guidance": guidance}
    found = o3s.find_grid(model, batches, to_data, 2, seed=5, **helped)

    dev = []
    for k, batch in enumerate(batches):
        generator = torch.Generator().manual_seed(seeds.seed(5, k))
        noise = torch.randn(batch.x1.shape, generator=generator)
        cond = model.prepare(lengths=batch.lengths, **batch.conditions, guided=guidance is not None)
        dev.append(o3s.DevBatch(noise, cond, batch))
    assert found == o3s.search(o3s.on_batches(model, dev, to_data, guidance=guidance), 2, **given)

    assert o3s.SearchResult.load(tmp_path / "o3s" / "o3s_nfe2_to data.json") == found
    assert len(list((tmp_path / "o3s" / "evaluations").iterdir())) == len(found.evaluations)
    solves.clear()
    assert o3s.find_grid(GraphSampler(model, 2), batches, to_data, 2, seed=5, **helped) == found
    assert not solves, "all known"
    other = o3s.find_grid(model, batches, to_data, 2, seed=6, **helped)
    assert other.value != found.value
    o3s.find_grid(model, batches, to_data, 2, seed=6, settings={"more": 1}, budget=1, **helped)
    assert len(solves) == len(batches) * (len(other.evaluations) + 1)

    solves.clear()
    batches[1] = replace(batches[1], x1=batches[1].x1 + 1)
    o3s.find_grid(model, batches, to_data, 2, seed=6, budget=1, **helped)
    assert len(solves) == len(batches), "of the same name, but another development set"


def test_metrics_of_one_folder_have_results_of_their_own(model, tmp_path):
    batches = batches_of(model)[:1]

    def find(name):
        given = {"higher_is_better": False, "folder": tmp_path, "budget": 1}
        return o3s.find_grid(model, batches, lambda mel, batch: len(name), 1, name=name, **given)

    for name in ("a", "bb", "of/a:b"):
        find(name)
    held = sorted(path.name for path in tmp_path.glob("*.json"))
    assert held == ["o3s_nfe1_a.json", "o3s_nfe1_bb.json", "o3s_nfe1_of%2Fa%3Ab.json"]
    assert o3s.SearchResult.load(tmp_path / held[0]).value == 1
    with pytest.raises(ValueError, match="name: expected a short one"):
        find("long" * 60)
