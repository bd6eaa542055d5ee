"""The table of the documents is what the committed results say."""

import json
from pathlib import Path

from examples.quickstart import summary

ROOT = Path(__file__).parents[2]


def test_table_is_measured():
    files = sorted((ROOT / "examples/quickstart/results").glob("*.json"))
    runs = [json.loads(path.read_text()) for path in files]
    assert len({run["seed"] for run in runs}) >= 3
    assert summary.table(runs) in (ROOT / "docs/benchmarks.md").read_text()
    assert all(claim["holds"] for run in runs for claim in run["claims"])
