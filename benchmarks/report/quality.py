"""Quality against NFE, from what the examples have measured."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report.plots import Plot
from examples.compare_objectives import summary
from examples.quickstart.figures import draw_curves

CURVES = {
    "quickstart": "of the quickstart's models",
    "text2mel": "of the text2mel example's teacher, and its student whose loss covers all frames",
}
STUDENT = "student, all"
"""The one of text2mel's two whose curve is drawn."""


def draw(examples: Path, folder: Path) -> tuple[list[Plot], list[str]]:
    """The plots, and the examples without results."""
    plots, without = [], []
    folder.mkdir(parents=True, exist_ok=True)
    for name, whose in CURVES.items():
        path = folder / f"{name}.png"
        runs = [json.loads(file.read_text()) for file in sorted(_files(examples / name))]
        if runs:
            draw_curves(path, means(runs))
            plots.append(Plot(path, f"Four metrics against NFE {whose}, {_of(len(runs))}"))
        else:
            without.append(name)
    compared = summary.load(examples / "compare_objectives" / "results")
    if compared:
        path = folder / "compare_objectives.png"
        summary.draw(compared, path)
        names = "; ".join(summary.NAMES[name] for name in compared)
        plots.append(Plot(path, f"Distance to the fine solve and Fréchet distance of {names}"))
    else:
        without.append("compare_objectives")
    return plots, without


def means(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of model, grid and NFE: every metric's mean over the runs that have it."""
    found = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for row in run["rows"]:
            model = "student" if row["model"] == STUDENT else row["model"]
            for metric, value in row.items():
                if isinstance(value, float):
                    found[model, row["grid"], row["nfe"]][metric].append(value)
    return [
        {"model": model, "grid": grid, "nfe": nfe}
        | {metric: statistics.mean(values) for metric, values in metrics.items()}
        for (model, grid, nfe), metrics in found.items()
    ]


def _of(runs: int) -> str:
    return "one run" if runs == 1 else f"means over {runs} runs"


def _files(example: Path) -> list[Path]:
    return list((example / "results").glob("*.json"))
