"""Quality against the number of forward passes, from the committed runs of the demo."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from docs.figures.source import digest

RESULTS = sorted((Path(__file__).parents[2] / "examples/quickstart/results").glob("*.json"))
FILE = "quality.png"
METADATA = {"Source": digest(__file__, *RESULTS)}

CURVES = (
    ("teacher", "teacher, guided", "#0072B2", "o-", 2),
    ("teacher_unguided", "teacher, unguided", "#7F7F7F", "v-", 1),
    ("student", "student", "#D55E00", "o-", 1),
)
PANELS = (
    ("to_teacher", "distance to the teacher's 32 steps"),
    ("frechet", "Fréchet distance of mel patches"),
    ("c2st", "told from the corpus (0.5: not at all)"),
)


def draw() -> Figure:
    """The x axis is forward passes of the network: a guided step is two."""
    runs = [json.loads(path.read_text()) for path in RESULTS]
    found = defaultdict(list)
    for row in (row for run in runs for row in run["rows"] if row["grid"] == "uniform"):
        found[row["model"], row["nfe"]].append(row)

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(1, 3), PANELS, strict=True):
        for model, label, color, style, branches in CURVES:
            steps = sorted(nfe for name, nfe in found if name == model)
            values = [[row[metric] for row in found[model, nfe]] for nfe in steps]
            at = [branches * nfe for nfe in steps]
            axes.plot(at, [mean(value) for value in values], style, color=color, label=label)
            axes.fill_between(
                at, [*map(min, values)], [*map(max, values)], color=color, alpha=0.15, linewidth=0
            )
        axes.set_xscale("log", base=2)
        if metric == "frechet":
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(FixedLocator([1, 2, 4, 8, 16]))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ticks = [2**k for k in range(7)]
        axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("forward passes (a guided step is two)")
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
