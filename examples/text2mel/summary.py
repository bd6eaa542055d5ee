"""The table of the documents, from the results of several runs: means over the seeds.

python -m examples.text2mel.summary examples/text2mel/results/*.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.quickstart import summary

COLUMNS = {"phonemes": ("phonemes", 3), **summary.COLUMNS}


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown, a row per model, NFE and grid; each number a mean over the runs."""
    rows = [(row["model"], row["nfe"], row["grid"]) for row in runs[0]["rows"]]
    return summary.table(
        runs, sorted(rows, key=lambda key: (key[0] != "teacher", key[0], -key[1])), COLUMNS
    )


def main() -> None:
    runs = [json.loads(Path(path).read_text()) for path in sys.argv[1:]]
    if not runs:
        sys.exit("usage: python -m examples.text2mel.summary results.json ...")
    print(f"seeds {', '.join(str(run['seed']) for run in runs)}\n")
    print(table(runs))
    for run in runs:
        print(
            f"seed {run['seed']}: {run['gate']['claim']} {run['gate']['value']:.3f} (gate "
            f"{run['gate']['limit']}), recogniser on true mels {run['ceiling']:.3f}"
        )


if __name__ == "__main__":
    main()
