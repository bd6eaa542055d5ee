"""The comparison of objectives on made data: budgets, results that are kept, tables."""

import itertools
import json

import pytest
import torch

pytest.importorskip("espeakng_loader", reason="needs the [demo] extra")
pytest.importorskip("librosa", reason="needs the [demo] extra")

from examples.compare_objectives import __main__ as comparison
from examples.compare_objectives import ablations, study, summary, training
from examples.compare_objectives.methods import METHODS, SWEEP
from examples.quickstart import metrics
from examples.quickstart.corpus import Corpus, Utterance
from examples.quickstart.model import Token2Mel
from imf_kernels.models import DiTConfig

SYMBOLS, SPEAKERS = ("_", "a", "b"), ("one", "two")


def utterance(number):
    frames = 20 + number % 5
    return Utterance(
        f"sentence {number}",
        number % len(SPEAKERS),
        torch.randint(len(SYMBOLS), (frames,)),
        torch.randn(frames, 80),
    )


def made_corpus(seed, symbols):
    torch.manual_seed(seed)
    train, dev, test = ([utterance(i) for i in range(count)] for count in (18, 2, 2))
    return Corpus(train, dev, test, symbols, SPEAKERS)


def small_teacher():
    torch.manual_seed(0)
    teacher = Token2Mel(SYMBOLS, SPEAKERS, DiTConfig(dim=64, depth=1, heads=1, channels=80))
    for parameter in teacher.estimator.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return teacher.eval()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(study, "build_corpus", made_corpus)
    monkeypatch.setattr(study, "load_teacher", small_teacher)
    monkeypatch.setattr(study, "FINE", 8)
    monkeypatch.setattr(metrics, "c2st", lambda *_, **__: 0.5)  # a classifier to train
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr("sys.argv", ["compare", *map(str, arguments)])
    module.main()


def test_a_comparison(tmp_path, monkeypatch, capsys):
    run(monkeypatch, comparison, "--seed", 3, "--updates", 4, "--out", tmp_path)
    files = {path.stem.removeprefix("seed3_"): path for path in tmp_path.glob("*.json")}
    assert files.keys() == summary.NAMES.keys()
    found = {name: json.loads(path.read_text()) for name, path in files.items()}
    allowed = found["int_mean_flow"]["snapshots"][-1]["seconds"]
    for name in METHODS:
        snapshots, tokens = found[name]["snapshots"], name == "ds_flow_tokens"
        assert summary.ended(found[name], "updates")["updates"] == 4
        assert summary.ended(found[name], "seconds")["seconds"] >= allowed
        assert [s["seconds"] for s in snapshots] == sorted(s["seconds"] for s in snapshots)
        assert found[name]["peak_bytes"] > 0
        assert (found[name]["held_bytes"] > 0) == ("reuse" in METHODS[name].options)
        for snapshot in snapshots:
            nfes = [row["nfe"] for row in snapshot["rows"]]
            steps = [1, 2, 3, 4] + [8] * bool(snapshot["budgets"])
            assert nfes == ([1, 2, 4] if tokens else steps)
        counted = found[name]["parameters"]
        assert (counted["student"] < counted["teacher"]) == tokens
    fine = found["teacher"]["snapshots"][0]["rows"][-1]
    assert fine["to_teacher"] == 0

    run(monkeypatch, summary, tmp_path)
    printed = capsys.readouterr().out
    assert f"| teacher, guided | 8 | {fine['mcd']:.2f} |" in printed
    assert printed.count("| DSFlow | 8 |") == 2
    assert printed.count("| DSFlow, step tokens | 2 |") == 2
    counted = found["ds_flow_tokens"]["parameters"]
    assert f"| {counted['teacher'] / 1e6:.2f} | {counted['student'] / 1e6:.2f} |" in printed
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_results_are_kept(tmp_path):
    path = tmp_path / "new" / "result.json"
    made = itertools.count()
    for _ in range(2):
        found = study.kept(path, {"counts": (1, 2)}, lambda: {"made": next(made)})
        assert found["made"] == 0
    with pytest.raises(ValueError, match="expected results of"):
        study.kept(path, {"counts": (1, 4)}, lambda: {"made": next(made)})
    assert next(made) == 1


def test_a_sweep_changes_one_thing_at_a_time(tmp_path, monkeypatch):
    only = ("--only", "split_mean_flow")
    run(monkeypatch, comparison, "--sweep", "--updates", 2, "--out", tmp_path, *only)
    found = {p.stem: json.loads(p.read_text())["settings"] for p in tmp_path.rglob("*.json")}
    chosen = found.pop("split_mean_flow chosen")
    assert len(found) == len(SWEEP["split_mean_flow"])
    for settings in found.values():
        assert sum(settings[key] != chosen[key] for key in chosen) == 1


def test_ablations(tmp_path, monkeypatch, capsys):
    only = ("--only", "mixer")
    run(monkeypatch, ablations, "--updates", 2, "--out", tmp_path, *only)
    table = capsys.readouterr().out
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(ablations.FACTORS["mixer"])
    run(monkeypatch, ablations, "--tables", "--out", tmp_path)
    assert capsys.readouterr().out in table


@pytest.mark.parametrize("factor", ablations.FACTORS)
def test_factors_are_settings(factor):
    defaults = METHODS["int_mean_flow"]
    for changes in ablations.FACTORS[factor].values():
        method = defaults.but(**changes)
        assert method.described != defaults.described
        method.student_of(small_teacher())
        method.objective_of(small_teacher(), 64, torch.Generator())


@pytest.mark.parametrize("name", SWEEP)
def test_changes_of_a_sweep_are_settings(name):
    for changes in SWEEP[name].values():
        method = METHODS[name].but(**changes)
        assert method.described != METHODS[name].described
        assert method.described.keys() == METHODS[name].described.keys()
        method.student_of(small_teacher())
        method.objective_of(small_teacher(), 4, torch.Generator())


def test_seconds_may_end_before_or_after_updates(monkeypatch):
    """A clock by which an update takes a second."""
    for seconds, ends in ((2.0, [("seconds",), ("updates",)]), (6.0, [("updates",), ("seconds",)])):
        clock = itertools.count()
        monkeypatch.setattr(training.time, "process_time", lambda clock=clock: next(clock))
        teacher = small_teacher()
        parameter = teacher.estimator.proj_out.bias
        snapshots = training.train(
            teacher,
            lambda student, batch, p=parameter: (p.square().sum(), {}),
            itertools.repeat(None),
            lr=1e-3,
            ema=None,
            ramp=10.0,
            updates=4,
            seconds=seconds,
        )
        assert [s.budgets for s in snapshots if s.budgets] == ends
        assert [s.updates for s in snapshots] == ([1, 2, 4] if seconds == 2 else [1, 2, 4, 6])


def test_the_average_of_weights():
    """Without decay it is the last weights; with it between, as the ramp lets."""
    for decay, ramp, want in (
        (0.0, 10.0, 5.0),
        (0.5, 10.0, 2.5),
        (0.5, 102.0, 2.5),
        (0.5, 304.0, 3.75),
    ):
        averages, weights = [torch.zeros(1)], [torch.full((1,), 5.0)]
        training._average(decay, ramp)(averages, weights, torch.tensor(100))
        assert averages[0] == pytest.approx(want)


def test_peak_of_a_call():
    def run():
        a = torch.ones(1000)  # 4,000 bytes, and as many again
        b = a + 1
        del a
        return b * 2  # in its place

    assert 8000 <= training.peak_bytes(run) < 9000
