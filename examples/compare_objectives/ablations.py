"""IntMeanFlow with one thing changed at a time, on the development split.

    python -m examples.compare_objectives.ablations --seed 0
    python -m examples.compare_objectives.ablations --tables

All students take the same updates. Only z_t on the line from noise to data has a distribution of
intervals; there every rollout has 4 sub-steps and serves 4 updates: the teacher is asked once per
update and row, as it is by the defaults.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from examples.compare_objectives.__main__ import RESULTS, trained
from examples.compare_objectives.methods import METHODS
from examples.compare_objectives.study import Study
from examples.compare_objectives.summary import ended, spread
from examples.quickstart.experiment import UPDATES

Changes = dict[str, Any]

ON_THE_LINE: Changes = {"source": "data", "spacing": "uniform", "nfe": 4, "reuse": 4}

FACTORS: Mapping[str, Mapping[str, Changes]] = {
    "teacher NFE": {f"{nfe}": {"nfe": nfe} for nfe in (2, 4, 8)},
    "share of [0, 1]": {
        "0": {"interval": {"full": 0.0}},
        ".5": {"interval": {"full": 0.5}},
    },
    "z_t": {"on the line": {"source": "data"}},
    "z_t on the line, intervals": {
        "uniform pairs, .2 of [0, 1]": {**ON_THE_LINE, "interval": {"full": 0.2}},
        "uniform pairs": {**ON_THE_LINE, "interval": {}},
        "small": {**ON_THE_LINE, "interval": {"a": 0.5, "b": 2.0}},
        "large": {**ON_THE_LINE, "interval": {"a": 2.0, "b": 1.0}},
    },
    "targets": {"2": {"targets": 2}, "4": {"targets": 4}},
    "updates of a rollout": {"4": {"reuse": 4}, "64": {"reuse": 64}},
    "mixer": {
        "D = .5 I": {"student": {"diagonal": 0.5}},
        "D = 0": {"student": {"diagonal": 0.0}},
    },
    "learning rate": {
        "cosine from 1e-3, no EMA": {"lr": 1e-3, "decay": "cosine", "ema": None},
        "cosine from 1e-3": {"lr": 1e-3, "decay": "cosine"},
        "cosine from 5e-4": {"lr": 5e-4, "decay": "cosine"},
        "cosine from 5e-4, no EMA": {"lr": 5e-4, "decay": "cosine", "ema": None},
    },
    "EMA": {
        "none": {"ema": None},
        ".95": {"ema": 0.95},
        "of the last quarter": {"ema": 0.999, "ramp": 5.0},
        "of the last half": {"ema": 0.999, "ramp": 3.0},
    },
}
"""By factor, what the defaults are changed to."""

COLUMNS = {"to_teacher": ("to teacher", 3), "frechet": ("Fréchet", 2)}
SHOWN = (1, 2, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of corpus, training and noise")
    parser.add_argument("--updates", type=int, default=UPDATES // 2)
    parser.add_argument("--out", type=Path, default=RESULTS / "ablations", help="a folder")
    parser.add_argument("--only", nargs="+", choices=FACTORS, default=list(FACTORS))
    parser.add_argument("--tables", action="store_true", help="of the results, without a run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.tables:
        ablate(args.seed, args.updates, args.out, args.only)
    print("\n".join(table(load(args.out))))


def ablate(seed: int, updates: int, out: Path, factors: list[str]) -> None:
    study, method = Study(seed, "dev"), METHODS["int_mean_flow"]
    runs = {"defaults": {"": {}}, **{factor: FACTORS[factor] for factor in factors}}
    for factor, choices in runs.items():
        for choice, changes in choices.items():
            path = out / f"seed{seed} {label(factor, choice)}.json"
            trained(study, path, "int_mean_flow", method.but(**changes), updates, None)


def label(factor: str, choice: str) -> str:
    return f"{factor} {choice}".strip()


def load(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """By label, a result of every seed."""
    found = defaultdict(list)
    for path in sorted(folder.glob("seed*.json")):
        found[path.stem.split(" ", 1)[1]].append(json.loads(path.read_text()))
    return found


def table(results: Mapping[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Markdown, a row per choice: the distance and the Fréchet distance by NFE, and seconds."""
    titles = [f"{title}, NFE {nfe}" for title, _ in COLUMNS.values() for nfe in SHOWN]
    yield f"| | | {' | '.join(titles)} | seconds |"
    yield "|---|---|" + "---|" * (len(titles) + 1)
    for factor, choices in {"defaults": {"": {}}, **FACTORS}.items():
        for choice in choices:
            if not (runs := results.get(label(factor, choice))):
                continue
            ends = [ended(run, "updates") for run in runs]
            cells = [
                spread((_at(end, nfe)[key] for end in ends), digits)
                for key, (_, digits) in COLUMNS.items()
                for nfe in SHOWN
            ]
            seconds = spread((end["seconds"] for end in ends), 0)
            yield f"| {factor} | {choice} | {' | '.join(cells)} | {seconds} |"


def _at(end: dict[str, Any], nfe: int) -> dict[str, float]:
    return next(row for row in end["rows"] if row["nfe"] == nfe)


if __name__ == "__main__":
    main()
