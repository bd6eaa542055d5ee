"""The tables of the page on objectives are what the committed results say."""

import json
import statistics
from pathlib import Path

from examples.compare_objectives import ablations, summary
from examples.compare_objectives.methods import METHODS
from examples.text2mel import summary as text2mel

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/objectives.md").read_text()
RESULTS = ROOT / "examples/compare_objectives/results"


def test_comparison():
    results = summary.load(RESULTS)
    assert results.keys() == summary.NAMES.keys()
    for name, runs in results.items():
        assert {run["settings"]["seed"] for run in runs} == {0, 1, 2}
        if name in METHODS:
            described = json.loads(json.dumps(METHODS[name].described))
            assert all(run["settings"].items() >= described.items() for run in runs)
    assert summary.costs(results) in PAGE
    for budget in ("updates", "seconds"):
        assert summary.table(results, budget) in PAGE
    assert f"{ablations.UPDATES // 2} updates each" in PAGE
    (guidance,) = {run["settings"]["guidance"] for run in results["teacher"]}
    assert f"teacher (w = {guidance:g})" in PAGE


def test_sweep():
    """Where the best of it was not taken, the page says so; and what was swept."""
    best = {}
    for path in (RESULTS / "sweep").glob("*.json"):
        run = json.loads(path.read_text())
        value = statistics.geometric_mean(r["to_teacher"] for r in run["snapshots"][-1]["rows"])
        best.setdefault(run["settings"]["method"], {})[path.stem.split(" ", 1)[1]] = value
    short = {k: v["chosen"] / min(v.values()) - 1 for k, v in best.items()}
    assert short.keys() == METHODS.keys()
    few = {"int_mean_flow", "ds_flow", "mean_flow"}
    tenths = {"ds_flow_tokens", "mean_flow_jvp"}
    assert {k for k, v in short.items() if v} == few | tenths
    assert "each 3 to 4 % from it" in PAGE
    assert all(0.025 < short[name] < 0.045 for name in few)
    assert "below 1 % from it" in PAGE
    assert all(short[name] < 0.01 for name in tenths)


def test_ablations():
    assert "\n".join(ablations.table(ablations.load(RESULTS / "ablations"))) in PAGE


def test_the_average_of_the_defaults():
    """An average's decay is (1 + k) / (10 + k) at update k, where that is less."""
    last = ablations.UPDATES // 2 - 1
    said = f"a decay of {(1 + last) / (10 + last):.3f} after".replace(" 0.", " .")
    assert said in PAGE


def test_text2mel():
    runs = [json.loads(p.read_text()) for p in (ROOT / "examples/text2mel/results").glob("*.json")]
    assert text2mel.table(runs) in PAGE
    (run,) = runs
    gate = run["gate"]
    assert f"true mels have {run['ceiling']:.3f}".replace("0.", ".") in " ".join(PAGE.split())
    said = f"It has {gate['value']:.3f} on the test split".replace("0.", ".")
    assert said in " ".join(PAGE.split())
    assert ("**the gate is passed**" in PAGE) == gate["holds"]
