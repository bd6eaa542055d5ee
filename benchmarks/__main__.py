"""All suites, one process after the other, most telling first: a crash loses one, a kill no row.

    python -m benchmarks                     the device's selection, into benchmarks/results/
    python -m benchmarks --selection full    every contender for every shape: hours of compilation
    python -m benchmarks ops latency         these suites

Options that are not listed go to pytest: `--device`, `--dtype`, `--rounds`, `-k`, ... The status is
1 where a row has failed. `python -m benchmarks.report` makes tables of what there is.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

SHARES = {
    "rtf": 5.0,
    "evaluation": 1.0,
    "ops": 1.5,
    "training": 2.0,
    "search": 0.7,
    "latency": 1.0,
}
"""Every suite, and its share of the minutes; what one leaves is for those that follow."""

EARLY = {"evaluation": "evaluation_pdl", "rtf": "rtf_pdl"}
"""Suites that are run again with programmatic dependent launch, where the device has it."""


def command(suite: str, out: Path, options: list[str]) -> list[str]:
    """pytest's, without plugins that reorder rows, stop long ones or print a table of each."""
    here = Path(__file__).parent
    plain = ["-p", "no:randomly", "-p", "no:cacheprovider", "--timeout", "0", "--benchmark-quiet"]
    rows = str(here / f"test_{suite}.py")
    return [sys.executable, "-m", "pytest", rows, *plain, f"--benchmark-json={out}", *options]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SHARES))
    parser.add_argument("--minutes", type=float, help="of all suites; by default no bound")
    parser.add_argument("--out", type=Path, help="a folder; by default named after the device")
    args, options = parser.parse_known_args(arguments)
    for suite in args.suites:
        if suite not in SHARES:
            parser.error(f"SUITE: expected any of {', '.join(SHARES)}, got {suite}")
    out = (args.out or Path(__file__).parent / "results" / device()).resolve()
    suites = [suite for suite in SHARES if suite in (args.suites or SHARES)]
    left, failed = args.minutes, []
    for i, suite in enumerate(suites):
        given = []
        if left is not None:
            share = SHARES[suite] / sum(SHARES[each] for each in suites[i:])
            given = [f"--minutes={max(left * share, 0.0):.2f}"]
        print(f"\n{suite}", flush=True)
        start = time.monotonic()
        run = subprocess.run(
            command(suite, out / f"{suite}.json", [*given, *options]),
            cwd=Path(__file__).parents[1],
            env=os.environ,
            check=False,
        )
        minutes = (time.monotonic() - start) / 60
        left = None if left is None else left - minutes
        print(f"{suite}: {60 * minutes:.0f} s", flush=True)
        if run.returncode:
            failed.append(suite)
    if failed:
        print(f"\nwith failures: {', '.join(failed)}")
    return int(bool(failed))


def device() -> str:
    """A folder's name for what is measured."""
    return torch.cuda.get_device_name().replace(" ", "_") if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
