"""All that waits for a GPU, one part after the other, most telling first: a failure stops no other.

    python -m benchmarks.on_gpu                          about 40 minutes, at most 95
    python -m benchmarks.on_gpu build tests bench        these parts only

Uses this Python with what is installed, and fetches nothing: a part whose needs are missing is left
out and says so. Results go to `benchmarks/results/<device>/`, the output of each part to `--logs`.
The status is 1 where a part has failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from benchmarks.__main__ import ROOT, environment, folder

PYTHON = sys.executable
PYTEST = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider")
SANITIZED = ("tests/ops", "tests/graphs", "-m", "gpu", "--timeout=0")


class Part(NamedTuple):
    """A command, the minutes until it is interrupted, and the modules and programs it needs."""

    command: tuple[str, ...]
    minutes: float
    needs: tuple[str, ...] = ()
    variables: Mapping[str, str] = MappingProxyType({})

    def missing(self) -> list[str]:
        return [
            name
            for name in self.needs
            if importlib.util.find_spec(name) is None and shutil.which(name) is None
        ]


def parts(device: str, results: Path) -> dict[str, Part]:
    """By name. Suites and scripts write a file that is whole after every row."""
    cuda = ("--device", device)

    def script(name: str, *options: str, **told: Any) -> Part:
        return Part((PYTHON, "-m", name, *cuda, *options), **told)

    def profile(name: str, *options: str) -> Part:
        out = ("--out", f"{results}/profile_{name}.json")
        return script("benchmarks.profile", *options, *out, minutes=3)

    def sanitize(tool: str) -> Part:
        told = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
        return Part((*told, *PYTEST, *SANITIZED), 15, ("compute-sanitizer", "pytest"))

    return {
        "build": Part(
            (PYTHON, "setup.py", "build_ext", "--inplace"),
            10,
            ("setuptools", "cmake", "ninja"),
            {"IMF_KERNELS_CUDA": "1"},
        ),
        "tests": Part((*PYTEST, "-m", "gpu"), 12, ("pytest", "hypothesis", "pytest_timeout")),
        "bench": script("benchmarks", "--minutes", "9", minutes=12, needs=("pytest_benchmark",)),
        "profile 10 s": profile("10s", "--seconds", "10"),
        "profile 1 s": profile("1s", "--seconds", "1"),
        "profile 1 s, no prompt": profile("1s_no_prompt", "--seconds", "1", "--prompt", "0"),
        "distillation": script(
            "benchmarks.distillation", "--out", f"{results}/distillation.json", minutes=8
        ),
        "memcheck": sanitize("memcheck"),
        "racecheck": sanitize("racecheck"),
        "quickstart": script(
            "examples.quickstart",
            *("--out", "out/gpu/quickstart"),
            minutes=12,
            needs=("espeakng_loader", "librosa", "soundfile", "matplotlib", "rich", "jinja2"),
        ),
        "report": Part(
            (PYTHON, "-m", "benchmarks.report"), 2, ("matplotlib", "librosa", "soundfile")
        ),
    }


def run(part: Part, log: Path) -> str:
    """How a part ended, in words; its output goes to a file."""
    missing = part.missing()
    if missing:
        return f"left out: {', '.join(missing)} missing"
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env=environment(**part.variables),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its children end with it
        )
        try:
            status = process.wait(60 * part.minutes)
        except subprocess.TimeoutExpired:
            _stop(process)
            return f"failed: stopped after {part.minutes:g} minutes"
        except KeyboardInterrupt:
            _stop(process)
            raise
    took = f"{time.monotonic() - start:.0f} s"
    return f"done in {took}" if status == 0 else f"failed with status {status} after {took}"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt it, so that pytest tells what has failed; then kill all that it has started."""
    for number, seconds in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


GRACE = 30.0
"""Seconds."""


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
