"""Everything that is measured on a CUDA device, one process after the other, most telling first.

    python -m benchmarks.gpu                 ten minutes, into benchmarks/results/<device>/
    python -m benchmarks.gpu --full          every column for every shape: hours of compilation

Further options go to all of them. What fails is reported in its file and does not stop the rest;
the status is 1 then.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

BRIEF = {
    "evaluation": "evaluation --columns eager ours fp8",
    "evaluation_pdl": (
        "IMF_KERNELS_PDL=1 evaluation --seconds 1 3 --batch 1 --packed 0 --columns eager ours"
    ),
    "ops": "ops --sizes large speech",
    "solver_graphs": "solver_graphs --seconds 1 10 --nfe 3 --columns eager ours --rounds 20",
    "rollout": "rollout",
    "training": "training --nfe 0 2 8 --columns eager ours",
    "solver_graphs_compiled": (
        "solver_graphs --models f5_base --seconds 10 --prompt 3.3 --batch 1 --nfe 3"
    ),
}
FULL = {
    "evaluation_full": "evaluation",
    "ops_full": "ops",
    "rollout_full": "rollout --nfe 2 8 16",
    "training_full": "training",
    "distillation": "distillation",
    "solver_graphs_full": "solver_graphs",
}


def parts(command: str) -> tuple[dict[str, str], str, list[str]]:
    """Environment variables, script and options, as a shell reads them."""
    words = command.split()
    variables = dict(word.split("=") for word in words if "=" in word)
    module, *options = words[len(variables) :]
    return variables, module, options


def launches_early() -> bool:
    """Whether the device has programmatic dependent launch."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--out", type=Path, help="a folder; by default named after the device")
    args, further = parser.parse_known_args()
    out = args.out
    if out is None:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        out = Path(__file__).parent / "results" / name.replace(" ", "_")
    out, failed = out.resolve(), []
    for name, command in (FULL if args.full else BRIEF).items():
        variables, module, options = parts(command)
        if variables and not launches_early():
            continue
        print(f"\n{name}: {command}", flush=True)
        start = time.monotonic()
        file = str(out / f"{name}.json")
        run = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{module}", *options, "--out", file, *further],
            cwd=Path(__file__).parents[1],
            env={**os.environ, **variables},
            check=False,
        )
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        if run.returncode:
            failed.append(name)
    if failed:
        print(f"\nwith failures: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
