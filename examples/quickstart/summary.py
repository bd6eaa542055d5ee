"""The table of docs/benchmarks.md, from the results of several runs: means over the seeds.

python -m examples.quickstart.summary examples/quickstart/results/*.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROWS = (
    *(("teacher", nfe, "uniform") for nfe in (32, 4, 2, 1)),
    *(("teacher_unguided", nfe, "uniform") for nfe in (32, 2, 1)),
    *(("student", nfe, "uniform") for nfe in (4, 3, 2, 1)),
    *(("student", nfe, "o3s") for nfe in (3, 2)),
    ("teacher", 4, "o3s"),
)
COLUMNS = {  # key: title, digits
    "mcd": ("MCD", 2),
    "frechet": ("Fréchet", 2),
    "sharpness": ("sharpness", 2),
    "c2st": ("C2ST", 3),
    "to_teacher": ("to teacher", 3),
    "seconds_per_audio_second": ("s per s", 4),
}
NAMES = {"teacher": "teacher, guided", "teacher_unguided": "teacher, unguided"}


def table(
    runs: Sequence[dict[str, Any]],
    keys: Sequence[tuple[str, int, str]] = ROWS,
    columns: Mapping[str, tuple[str, int]] = COLUMNS,
) -> str:
    """Markdown, a row per model, NFE and grid; each number a mean over the runs."""
    found = defaultdict(list)
    for run in runs:
        for row in run["rows"]:
            found[row["model"], row["nfe"], row["grid"]].append(row)
    titles = " | ".join(title for title, _ in columns.values())
    lines = [f"| model | NFE | grid | {titles} |", "|---|" + "---|" * (len(columns) + 2)]
    for model, nfe, grid in keys:
        rows = found[model, nfe, grid]
        cells = [
            f"{statistics.mean(row[key] for row in rows):.{digits}f}"
            for key, (_, digits) in columns.items()
        ]
        lines.append(f"| {NAMES.get(model, model)} | {nfe} | {grid} | {' | '.join(cells)} |")
    return "\n".join(lines)


def claims(runs: Sequence[dict[str, Any]]) -> str:
    """One line per claim: its values over the runs, and in how many it holds."""
    lines = []
    for same in zip(*(run["claims"] for run in runs), strict=True):
        values = ", ".join(f"{claim['value']:.3f}" for claim in same)
        limits = ", ".join(sorted({f"{claim['limit']:.3f}" for claim in same}))
        held = sum(claim["holds"] for claim in same)
        lines.append(f"{same[0]['claim']}: {values} (limit {limits}), {held} of {len(same)}")
    return "\n".join(lines)


def main() -> None:
    runs = [json.loads(Path(path).read_text()) for path in sys.argv[1:]]
    if not runs:
        sys.exit("usage: python -m examples.quickstart.summary results.json ...")
    print(f"seeds {', '.join(str(run['seed']) for run in runs)}\n")
    print(table(runs), claims(runs), sep="\n\n")


if __name__ == "__main__":
    main()
