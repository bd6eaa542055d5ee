"""Tables and a figure from the results: means over the seeds, and half their range.

python -m examples.compare_objectives.summary examples/compare_objectives/results
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from examples.quickstart.summary import COLUMNS
from imf_kernels.files import replacing

NAMES = {
    "teacher": "teacher, guided",
    "teacher_unguided": "teacher, unguided",
    "int_mean_flow": "IntMeanFlow",
    "split_mean_flow": "SplitMeanFlow",
    "ds_flow": "DSFlow",
    "ds_flow_tokens": "DSFlow, step tokens",
    "mean_flow": "MeanFlow",
    "mean_flow_jvp": "MeanFlow, JVP",
}
NUMBERS = {key: COLUMNS[key] for key in ("mcd", "frechet", "sharpness", "c2st", "to_teacher")}
PANELS = (("to_teacher", "distance to the fine solve"), ("frechet", "Fréchet distance"))

Results = dict[str, list[dict[str, Any]]]
"""By method, a result of every seed."""


def load(folder: Path) -> Results:
    found: Results = defaultdict(list)
    for path in sorted(folder.glob("seed*.json")):
        result = json.loads(path.read_text())
        found[result["settings"]["method"]].append(result)
    return {name: found[name] for name in NAMES if name in found}


def spread(values: Iterable[float], digits: int) -> str:
    """The mean, and half the range where there are several."""
    values = list(values)
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"


def ended(result: dict[str, Any], budget: str) -> dict[str, Any]:
    """The snapshot at a budget's end."""
    return next(s for s in result["snapshots"] if budget in s["budgets"])


def table(results: Results, budget: str) -> str:
    """Markdown: the five numbers at the end of a budget, a row per method and NFE."""
    titles = " | ".join(title for title, _ in NUMBERS.values())
    lines = [f"| | NFE | {titles} |", "|---|" + "---|" * (len(NUMBERS) + 1)]
    for name, runs in results.items():
        by_nfe = defaultdict(list)
        for run in runs:
            for row in ended(run, budget)["rows"]:
                by_nfe[row["nfe"]].append(row)
        for nfe, rows in by_nfe.items():
            cells = [
                spread((row[key] for row in rows), digits) for key, (_, digits) in NUMBERS.items()
            ]
            lines.append(f"| {NAMES[name]} | {nfe} | {' | '.join(cells)} |")
    return "\n".join(lines)


def costs(results: Results) -> str:
    """Markdown: what the students took."""
    lines = [
        "| | updates | seconds | updates in IntMeanFlow's seconds | peak of an update, MB "
        "| held rollouts, MB | parameters, millions: teacher | student |",
        "|---|---|---|---|---|---|---|---|",
    ]
    columns: tuple[tuple[Callable[[Any], float], int], ...] = (
        (lambda run: ended(run, "updates")["updates"], 0),
        (lambda run: ended(run, "updates")["seconds"], 0),
        (lambda run: ended(run, "seconds")["updates"], 0),
        (lambda run: run["peak_bytes"] / 1e6, 0),
        (lambda run: run["held_bytes"] / 1e6, 0),
        (lambda run: run["parameters"]["teacher"] / 1e6, 2),
        (lambda run: run["parameters"]["student"] / 1e6, 2),
    )
    for name, runs in results.items():
        if "peak_bytes" in runs[0]:
            cells = [spread(map(value, runs), digits) for value, digits in columns]
            lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    """Two metrics against NFE after equal seconds, and against the seconds at NFE 1: a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for (key, title), (by_nfe, by_time) in zip(PANELS, axes, strict=True):
        for color, (name, runs) in enumerate(results.items()):
            style = {"color": f"C{color}", "marker": ".", "label": NAMES[name]}
            rows = _mean([ended(run, "seconds")["rows"] for run in runs])
            shown = [(row["nfe"], row[key]) for row in rows if row[key] > 0]  # on a log scale
            by_nfe.plot(*zip(*shown, strict=True), **style)
            if name.startswith("teacher"):
                by_time.axhline(rows[0][key], color=f"C{color}", linestyle=":")
                continue
            ways = [_way(run) for run in runs]
            common = [key for key in ways[0] if all(key in way for way in ways)]
            points = _mean([[way[key] for key in common] for way in ways])
            points.sort(key=lambda point: point["s"])
            by_time.plot([p["s"] for p in points], [p[key] for p in points], **style)
        by_nfe.set(title=f"{title}, equal seconds", xlabel="solver steps (NFE)", xscale="log")
        by_nfe.set_xticks([1, 2, 3, 4, 32], labels=["1", "2", "3", "4", "32"])
        by_nfe.minorticks_off()
        by_time.set(title=f"{title} at NFE 1", xlabel="seconds of training")
    axes[0, 0].legend(frameon=False)
    for panel in axes.flat:
        panel.set_yscale("log")
        for axis in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            axis("{x:.2g}")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _way(run: dict[str, Any]) -> dict[Any, dict[str, float]]:
    """The numbers at NFE 1 with the seconds of training, after updates or at the end of seconds."""
    return {
        "seconds" if s["budgets"] == ["seconds"] else s["updates"]: {
            "s": s["seconds"],
            **s["rows"][0],
        }
        for s in run["snapshots"]
    }


def _mean(runs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, float]]:
    """Row by row over the runs."""
    return [
        {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
        for rows in zip(*runs, strict=True)
    ]


def main() -> None:
    if len(sys.argv) != 2 or not (results := load(Path(sys.argv[1]))):
        sys.exit("usage: python -m examples.compare_objectives.summary FOLDER")
    seeds = sorted({run["settings"]["seed"] for runs in results.values() for run in runs})
    print(f"seeds {', '.join(map(str, seeds))}")
    for budget in ("updates", "seconds"):
        print(f"\nequal {budget}:\n\n{table(results, budget)}")
    print(f"\n{costs(results)}")
    draw(results, Path(sys.argv[1]) / "comparison.png")


if __name__ == "__main__":
    main()
