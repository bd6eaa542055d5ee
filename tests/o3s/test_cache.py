"""Evaluations on disk: what they are of, what damages them, and what a kill leaves."""

import json
import os
import signal

import pytest
import torch
from torch import nn

from imf_kernels import grids, o3s
from imf_kernels.graphs import GraphSampler, bake
from imf_kernels.models import StepTokenDiT
from imf_kernels.o3s.sharding import Sharded
from tests.models.tools import small_model
from tests.o3s.tools import on_ranks, rugged_on_grids

NEEDED = {"model": "weights", "name": "metric@dev"}


class Counting:
    def __init__(self, metric):
        self.metric, self.calls = metric, 0

    def __call__(self, grid):
        self.calls += 1
        return self.metric(grid)


@pytest.fixture
def cache(tmp_path):
    return o3s.DiskCache(tmp_path / "new" / "evaluations")


def files(cache):
    return sorted(cache.folder.glob("*.json"))


def paid(cache, metric=lambda grid: 0.5, grid=(0.0, 0.5, 1.0), **given):
    """Whether the metric was asked."""
    counting = Counting(metric)
    cache.wrap(counting, **(NEEDED | given))(torch.as_tensor(grid))
    return counting.calls == 1


# -- keys -----------------------------------------------------------------------------------------


def test_a_second_search_pays_nothing(cache):
    options = {"higher_is_better": True, "tolerance": 0.2}
    want = o3s.search(rugged_on_grids(3), 3, **options)
    for calls in (len(want.evaluations), 0):
        metric = Counting(rugged_on_grids(3))
        assert o3s.search(cache.wrap(metric, **NEEDED), 3, **options) == want
        assert metric.calls == calls
    assert len(files(cache)) == len(want.evaluations)


def test_other_questions_are_paid_for(cache):
    other = [
        {},
        {"model": "other weights"},
        {"name": "metric@test"},
        {"guidance": 3.0},
        {"guidance": None},
        {"guidance": 3.0, "seed": 1},
        {"grid": (0.0, 0.5000001, 1.0)},
        {"grid": grids.uniform(3)},
    ]
    for given in other:
        assert paid(cache, **given), given
    for given in other:
        assert not paid(cache, **given), given
    assert not paid(cache, seed=1, guidance=3.0), "settings have no order"


def test_an_evaluation_is_readable(cache):
    paid(cache, lambda grid: 0.1, guidance=(2, 3.5))
    (path,) = files(cache)
    assert json.loads(path.read_text()) == {
        "value": 0.1,
        "name": "metric@dev",
        "settings": {"guidance": [2, 3.5]},
        "weights": "weights",
        "grid": [0.0, 0.5, 1.0],
    }
    assert not paid(cache, guidance=[2, 3.5])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1, torch.tensor(0.25)])
def test_values_come_back_as_they_were(cache, value):
    got = [cache.wrap(lambda grid: value, **NEEDED)(grids.uniform(1)) for _ in range(2)]
    assert list(map(repr, got)) == [repr(float(value))] * 2
    assert len(files(cache)) == 1


@pytest.mark.parametrize("settings", [{"seed": {1, 2}}, {"w": float("nan")}, {"w": torch.ones(1)}])
def test_settings_are_what_json_holds(cache, settings):
    with pytest.raises(TypeError, match="settings: expected what JSON holds, got"):
        cache.wrap(len, **NEEDED, **settings)


# -- weights --------------------------------------------------------------------------------------


def test_weights_are_told_apart_by_all_of_them(cache):
    model = small_model("f5_v1").eval()
    assert paid(cache, model=model)
    assert not paid(cache, model=small_model("f5_v1"))
    sampler = GraphSampler(model, 2, [(1, 24)])
    assert not paid(cache, model=sampler), "of the same model"
    # same names, shapes and values, another network
    assert paid(cache, model=small_model("f5_v0"))
    assert paid(cache, model=small_model("f5_v1").bfloat16())
    with torch.no_grad():
        model.proj_out.bias[-1] += 1e-6
    assert paid(cache, model=model)


class Named(nn.Module):
    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def test_the_hash_covers_names_dtypes_shapes_and_bytes(cache):
    x = torch.arange(6.0)
    for tensors in (
        {"a": x},
        {"b": x},
        {"a": x.view(2, 3)},
        {"a": x.view(torch.int32)},
        {"a": x, "empty": x[:0]},
        {"a": x.view(2, 3).T},
        {"a": x.bfloat16(), "scalar": x[0]},
    ):
        assert paid(cache, model=Named(**tensors))
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        assert not paid(cache, model=Named(**copies))


def test_weights_that_change_are_to_be_wrapped_anew(cache):
    model = nn.Linear(2, 2)
    metric = cache.wrap(lambda grid: 1.0, model=model, name="x")
    assert metric(grids.uniform(1)) == 1.0
    with torch.no_grad():
        model.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"model: expected the weights that were wrapped"):
        metric(grids.uniform(1))
    assert paid(cache, model=model, grid=grids.uniform(1), name="x")


def test_models_that_cannot_be_told_apart_are_refused(cache):
    for model in (object(), len):
        with pytest.raises(TypeError, match="model: expected a module with dense weights"):
            cache.wrap(len, model=model, name="x")
    baked = bake(small_model("cosyvoice3").eval(), ["uniform"], nfe=2, buckets=[(1, 24)])
    with pytest.raises(ValueError, match="got a baked one"):
        cache.wrap(len, model=baked, name="x")


def test_a_model_with_step_tokens_has_one_set_of_weights_for_all_grids(cache):
    model = small_model("f5_v1", depth=1)
    assert paid(cache, model=StepTokenDiT.of(model, (1, 2)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = StepTokenDiT.of(model, (1, 2))
    assert paid(cache, model=student), "other tokens"
    assert not paid(cache, model=student)
    student.counts = (1, 4)
    assert paid(cache, model=student), "the same token, of another count"


# -- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "null",
        lambda text: text.replace("0.5,", '"0.5",', 1),
        lambda text: text.replace('"value"', '"valve"'),
        lambda text: text.replace("metric@dev", "metric@test"),
        lambda text: text.replace('"name"', '"more": 1, "name"'),
        lambda text: text.replace("metric", "\udcff", 1),
    ],
)
def test_what_is_damaged_is_ignored_and_written_anew(cache, damage):
    assert paid(cache)
    (path,) = files(cache)
    sound = path.read_text()
    path.write_bytes(damage(sound).encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match=f"ignored a damaged evaluation, {path}"):
        assert paid(cache)
    assert path.read_text() == sound
    assert not paid(cache)


def test_a_folder_that_cannot_be_made_or_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        paid(o3s.DiskCache(tmp_path / "file" / "evaluations"))
    cache = o3s.DiskCache(tmp_path / "gone")
    cached = cache.wrap(lambda grid: 1.0, **NEEDED)
    cache.folder.rmdir()
    with pytest.raises(FileNotFoundError, match="gone"):
        cached(grids.uniform(1))


# -- ranks ----------------------------------------------------------------------------------------


def test_rank_0_reads_and_writes_for_all(tmp_path):
    def work(ranks):
        asked = []
        metric = Sharded(lambda grid, own: asked.append(1) or own, [1, 2, 6], None, o3s.mean, ranks)
        cache = o3s.DiskCache(tmp_path / str(ranks.rank))
        cached = cache.wrap(metric, **NEEDED)
        values = [cached(grids.uniform(2)) for _ in range(2)]
        return values, len(asked), len(files(cache))

    assert on_ranks(2, work) == [([3.0, 3.0], 1, 1), ([3.0, 3.0], 1, 0)]
    assert on_ranks(2, work) == [([3.0, 3.0], 0, 1), ([3.0, 3.0], 0, 0)]


def test_ranks_with_other_weights_are_refused(tmp_path):
    def work(ranks):
        metric = Sharded(lambda grid, own: own, [1, 2], None, o3s.mean, ranks)
        return o3s.DiskCache(tmp_path).wrap(metric, model=f"seed {ranks.rank}", name="x")

    for error in on_ranks(2, work):
        assert isinstance(error, ValueError)
        assert "expected the same on every rank, got" in str(error)
        assert "seed 0" in str(error)
        assert "seed 1" in str(error)


def test_weights_that_changed_on_one_rank_raise_on_all(tmp_path):
    def work(ranks):
        model = nn.Linear(2, 2)
        nn.init.ones_(model.weight), nn.init.ones_(model.bias)
        metric = Sharded(lambda grid, own: own, [1, 2], None, o3s.mean, ranks)
        cached = o3s.DiskCache(tmp_path).wrap(metric, model=model, name="x")
        if ranks.rank == 1:
            nn.init.zeros_(model.bias)
        return cached(grids.uniform(1))

    for error in on_ranks(2, work):
        assert str(error).startswith("rank 1 of 2: RuntimeError: model: expected the weights")


def test_ranks_with_other_grids_are_refused(tmp_path):
    """Also where rank 0 knows its own."""

    def work(ranks):
        metric = Sharded(lambda grid, own: own, [1, 2], None, o3s.mean, ranks)
        cached = o3s.DiskCache(tmp_path).wrap(metric, **NEEDED)
        cached(grids.uniform(1))
        return cached(grids.uniform(1 + ranks.rank))

    for error in on_ranks(2, work):
        assert isinstance(error, ValueError)
        assert str(error).startswith("grid: expected the same on every rank, got [0.0, 1.0]; [")


def test_a_write_that_fails_raises_on_all_ranks(tmp_path):
    def work(ranks):
        metric = Sharded(lambda grid, own: own, [1, 2], None, o3s.mean, ranks)
        cache = o3s.DiskCache(tmp_path / str(ranks.rank))
        cached = cache.wrap(metric, **NEEDED)
        if ranks.rank == 0:
            cache.folder.rmdir()
        return cached(grids.uniform(1))

    for error in on_ranks(2, work):
        assert str(error).startswith("rank 0 of 2: FileNotFoundError")


# -- kills ----------------------------------------------------------------------------------------


def forked(work):
    """How a child that runs `work` ends."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("moment", ["evaluating", "writing", "renaming"])
def test_a_killed_search_pays_no_evaluation_twice(cache, tmp_path, monkeypatch, moment):
    """Killed again and again, each time a little later."""
    log = tmp_path / "paid"
    options = {"higher_is_better": True, "tolerance": 0.2}
    want = o3s.search(rugged_on_grids(5), 3, **options)

    def run(kill_at):
        """Kills itself at its k-th new evaluation."""
        calls = 0

        def die(*_, **__):
            os.kill(os.getpid(), signal.SIGKILL)

        def metric(grid):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                if moment == "evaluating":
                    die()
                target = {"writing": "write_text", "renaming": "replace"}[moment]
                monkeypatch.setattr(f"pathlib.Path.{target}", die)
            with log.open("a") as file:
                file.write(f"{grid.tolist()}\n")
            return rugged_on_grids(5)(grid)

        return o3s.search(cache.wrap(metric, **NEEDED), 3, **options)

    for kill_at in (1, 3, 8):
        assert forked(lambda kill_at=kill_at: run(kill_at)) == signal.SIGKILL
    assert len(files(cache)) == 0 + 2 + 7
    assert run(None) == want
    grids_paid = log.read_text().splitlines()
    interrupted = 0 if moment == "evaluating" else 3
    assert len(grids_paid) == len(want.evaluations) + interrupted
    assert len(set(grids_paid)) == len(want.evaluations)
    assert len(files(cache)) == len(want.evaluations)
