"""All that waits for a GPU, one part after the other, most telling first: a failure stops no other.

    python -m benchmarks.on_gpu                          about 40 minutes, the tests included
    python -m benchmarks.on_gpu build tests bench        these parts only

Uses this Python with what is installed, and fetches nothing. Results go to
`benchmarks/results/<device>/`, the output of each part to `--logs`. The status is 1 where a part
has failed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.__main__ import ROOT, environment, folder

PYTHON = sys.executable
PYTEST = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider")
SANITIZED = ("tests/ops", "tests/graphs", "-m", "gpu", "--timeout=0")


class Part(NamedTuple):
    """A command, and the minutes after which it is stopped; None: what it needs is not here."""

    command: tuple[str, ...] | None
    minutes: float


def parts(device: str, results: Path) -> dict[str, Part]:
    """By name. What they write is whole after every row, so a part that is stopped loses none."""
    script = (PYTHON, "-m")
    cuda = ("--device", device)
    sanitizer = shutil.which("compute-sanitizer")

    def sanitize(tool: str) -> tuple[str, ...] | None:
        exit_code = ("--error-exitcode", "9")
        return sanitizer and (sanitizer, "--tool", tool, *exit_code, *PYTEST, *SANITIZED)

    return {
        "build": Part((PYTHON, "setup.py", "build_ext", "--inplace"), 10),
        "tests": Part((*PYTEST, "-m", "gpu"), 10),
        "bench": Part((*script, "benchmarks", *cuda, "--minutes", "9"), 12),
        "profile": Part(
            (*script, "benchmarks.profile", *cuda, "--out", f"{results}/profile.json"), 3
        ),
        "distillation": Part(
            (*script, "benchmarks.distillation", *cuda, "--out", f"{results}/distillation.json"), 8
        ),
        "memcheck": Part(sanitize("memcheck"), 10),
        "racecheck": Part(sanitize("racecheck"), 10),
        "quickstart": Part(
            (*script, "examples.quickstart", *cuda, "--out", "out/gpu/quickstart"), 12
        ),
        "report": Part((*script, "benchmarks.report"), 2),
    }


def run(part: Part, log: Path) -> str:
    """How a part ended, in words; its output goes to a file."""
    if part.command is None:
        return "left out: compute-sanitizer is not here"
    start = time.monotonic()
    with log.open("w") as output:
        try:
            status = subprocess.run(
                part.command,
                cwd=ROOT,
                env=environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=60 * part.minutes,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return f"failed: stopped after {part.minutes:g} minutes"
    took = f"{time.monotonic() - start:.0f} s"
    return f"done in {took}" if status == 0 else f"failed with status {status} after {took}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--logs", type=Path, default=ROOT / "out" / "gpu")
    args = parser.parse_args(arguments)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("device: expected a CUDA device, found none")
    known = parts(args.device, Path("benchmarks/results") / folder(args.device))
    for name in args.parts:
        if name not in known:
            parser.error(f"PART: expected any of {', '.join(known)}, got {name}")
    args.logs.mkdir(parents=True, exist_ok=True)
    failed = False
    for name, part in known.items():
        if not args.parts or name in args.parts:
            ended = run(part, args.logs / f"{name}.log")
            print(f"{name}: {ended}", flush=True)
            failed = failed or ended.startswith("failed")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
