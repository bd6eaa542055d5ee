"""The tables of the page on objectives are what the committed results say."""

import json
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


def test_ablations():
    assert "\n".join(ablations.table(ablations.load(RESULTS / "ablations"))) in PAGE


def test_text2mel():
    runs = [json.loads(p.read_text()) for p in (ROOT / "examples/text2mel/results").glob("*.json")]
    assert text2mel.table(runs) in PAGE
    (run,) = runs
    gate = run["gate"]
    assert f"true mels have {run['ceiling']:.3f}".replace("0.", ".") in " ".join(PAGE.split())
    said = f"It has {gate['value']:.3f} on the test split".replace("0.", ".")
    assert said in " ".join(PAGE.split())
    assert ("**the gate is passed**" in PAGE) == gate["holds"]
