"""All suites, one process after the other, most telling first: a crash loses one, a kill no row.

    python -m benchmarks                     the device's selection, into benchmarks/results/
    python -m benchmarks --selection full    every contender for every shape: hours of compilation
    python -m benchmarks ops latency         these only

Further options go to pytest: `--dtype`, `--rounds`, `-k`, ... The status is 1 where a row has
failed. `python -m benchmarks.report` makes tables of what there is.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]


class Part(NamedTuple):
    """A suite's run: its share of the minutes, and what its environment is given."""

    suite: str
    share: float
    variables: Mapping[str, str] = MappingProxyType({})


PARTS = {
    "rtf": Part("rtf", 6.5),
    "evaluation": Part("evaluation", 0.6),
    "ops": Part("ops", 1.2),
    "training": Part("training", 1.2),
    "search": Part("search", 0.7),
    "latency": Part("latency", 1.0),
    "evaluation_pdl": Part("evaluation", 0.5, {"IMF_KERNELS_PDL": "1"}),
}
"""By the name of its file. The last for GPUs that launch dependent kernels early."""


def command(suites: Sequence[str], out: Path, options: Sequence[str]) -> list[str]:
    """pytest's, from `ROOT`, without the plugins that reorder rows, stop long ones and tabulate."""
    rows = [f"benchmarks/test_{suite}.py" for suite in suites]
    out = out.resolve()
    if out.is_relative_to(ROOT):  # the command is part of the results: no paths of this machine
        out = out.relative_to(ROOT)
    plain = ["-p", "no:randomly", "-p", "no:cacheprovider", "--timeout=0", "--benchmark-quiet"]
    return [sys.executable, "-m", "pytest", *rows, *plain, f"--benchmark-json={out}", *options]


def environment(**variables: str) -> dict[str, str]:
    """This one's, without what pytest itself has set: its workers time nothing."""
    inherited = {name: it for name, it in os.environ.items() if not name.startswith("PYTEST_")}
    return inherited | variables


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help="of all of them; by default no bound")
    parser.add_argument("--out", type=Path, help="a folder; by default named after the device")
    args, options = parser.parse_known_args(arguments)
    for name in args.parts:
        if name not in PARTS:
            parser.error(f"PART: expected any of {', '.join(PARTS)}, got {name}")
    options = [f"--device={args.device}", *options]
    out = args.out or ROOT / "benchmarks/results" / folder(args.device)
    parts = {name: part for name, part in PARTS.items() if name in args.parts}
    if not args.parts:
        early = launches_early(args.device)
        parts = {name: part for name, part in PARTS.items() if early or not part.variables}
    left, shares, failed = args.minutes, sum(part.share for part in parts.values()), []
    for name, part in parts.items():
        given = list(options)
        if left is not None:
            given.append(f"--minutes={max(left, 0.0) * part.share / shares:.2f}")
        print(f"\n{name}", flush=True)
        start = time.monotonic()
        run = subprocess.run(
            command([part.suite], out / f"{name}.json", given),
            cwd=ROOT,
            env=environment(**part.variables),
            check=False,
        )
        minutes = (time.monotonic() - start) / 60
        print(f"{name}: {60 * minutes:.0f} s", flush=True)
        left, shares = None if left is None else left - minutes, shares - part.share
        if run.returncode:
            failed.append(name)
    if failed:
        print(f"\nwith failures: {', '.join(failed)}")
    return int(bool(failed))


def folder(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    return torch.cuda.get_device_name(device).replace(" ", "_")


def launches_early(device: str) -> bool:
    """Whether the device has programmatic dependent launch."""
    return device.startswith("cuda") and torch.cuda.get_device_capability(device)[0] >= 9


if __name__ == "__main__":
    sys.exit(main())
