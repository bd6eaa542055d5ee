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
    assert short.keys() == METHODS.keys() - {"mean_flow_jvp"}
    assert {k for k, v in short.items() if v} == {"int_mean_flow", "mean_flow", "ds_flow_tokens"}
    assert all(0.03 < short[name] < 0.04 for name in ("int_mean_flow", "mean_flow"))
    assert f"keep 5e-4, {100 * short['ds_flow_tokens']:.1f} %".replace(" 0.", " .") in PAGE
    assert "with three\nexceptions" in PAGE
    assert "it was not swept" in PAGE


def test_ablations():
    assert "\n".join(ablations.table(ablations.load(RESULTS / "ablations"))) in PAGE


def test_averages_that_are_one():
    """An average's decay is (1 + k) / (10 + k) at update k, where that is less."""
    last = ablations.UPDATES // 2 - 1
    assert f"comes to {(1 + last) / (10 + last):.3f} at most".replace(" 0.", " .") in PAGE
    runs = ablations.load(RESULTS / "ablations")
    ends = [summary.ended(runs[f"EMA {decay}"][0], "updates")["rows"] for decay in (".99", ".999")]
    assert ends[0] == ends[1]


def test_text2mel():
    runs = [json.loads(p.read_text()) for p in (ROOT / "examples/text2mel/results").glob("*.json")]
    assert text2mel.table(runs) in PAGE
    (run,) = runs
    gate = run["gate"]
    assert f"true mels have {run['ceiling']:.3f}".replace("0.", ".") in " ".join(PAGE.split())
    said = f"It has {gate['value']:.3f} on the test split".replace("0.", ".")
    assert said in " ".join(PAGE.split())
    assert ("**the gate is passed**" in PAGE) == gate["holds"]
