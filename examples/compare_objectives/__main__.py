"""IntMeanFlow, SplitMeanFlow, DSFlow, MeanFlow and the plain teacher, at equal budgets.

    python -m examples.compare_objectives --seed 0 --out examples/compare_objectives/results
    python -m examples.compare_objectives --sweep --out examples/compare_objectives/results

Every objective trains one student, which is measured on the test split after as many updates as all
and after the seconds that IntMeanFlow's updates took, on one thread. Seconds are of CPU time, which
other work on the machine changes little. Results are a file per seed and objective; those that are
there are not made again. `--sweep` tries the settings of `methods.SWEEP` on the development split
instead.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from examples.compare_objectives.methods import METHODS, SWEEP, Method
from examples.compare_objectives.study import Study, kept
from examples.quickstart.experiment import GUIDANCE, UPDATES

TEACHERS = {"teacher": GUIDANCE, "teacher_unguided": None}
RESULTS = Path(__file__).with_name("results")
SWEEP_UPDATES = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of corpus, training and noise")
    parser.add_argument("--updates", type=int, help=f"{UPDATES}, or in a sweep {SWEEP_UPDATES}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.sweep:
        sweep(args.seed, args.updates or SWEEP_UPDATES, args.out / "sweep", args.only)
    else:
        compare(args.seed, args.updates or UPDATES, args.out, args.only)


def compare(seed: int, updates: int, out: Path, names: Iterable[str]) -> None:
    """All of a seed; IntMeanFlow first, which sets the budget of seconds."""
    study = Study(seed, "test")
    for name, guidance in TEACHERS.items():
        settings = {"method": name, "seed": seed, "guidance": guidance}
        path = out / f"seed{seed}_{name}.json"
        show(path, kept(path, settings, lambda guidance=guidance: study.untrained(guidance)))
    seconds = None
    for name in dict.fromkeys(("int_mean_flow", *names)):
        found = trained(
            study, out / f"seed{seed}_{name}.json", name, METHODS[name], updates, seconds
        )
        if seconds is None:
            seconds = found["snapshots"][-1]["seconds"]


def sweep(seed: int, updates: int, out: Path, names: Iterable[str]) -> None:
    """Each method's settings and, one at a time, what else could be; development split."""
    study = Study(seed, "dev")
    for name in names:
        if name not in SWEEP:
            continue
        scores = {}
        for label, changes in {"chosen": {}, **SWEEP[name]}.items():
            path = out / f"{name} {label}.json"
            found = trained(study, path, name, METHODS[name].but(**changes), updates, None)
            rows = found["snapshots"][-1]["rows"]
            scores[label] = statistics.geometric_mean(row["to_teacher"] for row in rows)
        print(f"{name}: nearest to the fine solve is {min(scores, key=scores.__getitem__)}")


def trained(
    study: Study, path: Path, name: str, method: Method, updates: int, seconds: float | None
) -> Any:
    """A method's results, made or found."""
    settings = {"method": name, "seed": study.seed, "updates": updates, **method.described}
    found = kept(path, settings, lambda: study.trained(method, updates, seconds))
    show(path, found)
    return found


def show(path: Path, found: dict[str, Any]) -> None:
    """A line per file: the end of the run, at every number of steps."""
    last = found["snapshots"][-1]
    distances = "  ".join(f"{row['nfe']}: {row['to_teacher']:.3f}" for row in last["rows"])
    print(f"{path.stem:<40}{last['seconds']:7.0f} s   to teacher  {distances}", flush=True)


if __name__ == "__main__":
    main()
