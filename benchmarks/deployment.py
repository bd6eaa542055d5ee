"""A student's exported files beside this package's own kernels, on a CPU.

    python -m benchmarks.deployment --out benchmarks/results/cpu/deployment.json

A DiT of the widths of F5TTS_v1_Small, cut to 4 blocks, float32, one row of which a third is prompt.
Exports are made for one row. All solve the same inputs in turn, and the fastest of the rounds
counts; there is no row if one is farther than 1e-4 (relative RMS of the displacement) from ours.
Peak memory is that of a fresh process that loads a file and solves once, from Python: what PyTorch
itself takes is in it.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import facts
from benchmarks.deployed import RUNTIMES, Solve
from benchmarks.timing import turns
from benchmarks.workload import build, error, request
from imf_kernels import export
from imf_kernels.models import Baked

BOUND = 1e-4
EXPORTS = [name for name in RUNTIMES if name != "ours"]
CPU = torch.device("cpu")


def files(student: Baked, names: list[str], folder: Path) -> dict[str, str]:
    """What each runtime loads."""
    write: dict[str, tuple[str, Callable[[Path], object]]] = {
        "ours": (".safetensors", student.save),
        "AOTInductor": (".pt2", lambda path: export.aot_inductor(student, path, rows=1)),
        "onnxruntime": (".onnx", lambda path: export.onnx(student, path, rows=1)),
    }
    made = {}
    for name in names:
        suffix, save = write[name]
        made[name] = str(folder / f"student{suffix}")
        save(Path(made[name]))
    return made


def measure(
    solves: Mapping[str, Solve], inputs: dict[str, np.ndarray], rounds: int
) -> dict[str, dict[str, float]]:
    """By runtime, seconds and the distance from ours, after it is found to be small."""
    mels = {name: solve(inputs) - inputs["noise"] for name, solve in solves.items()}
    want = torch.from_numpy(mels["ours"])
    distances = {name: error(torch.from_numpy(mel), want) for name, mel in mels.items()}
    if not all(distance <= BOUND for distance in distances.values()):
        raise ArithmeticError(f"expected all within {BOUND} of ours, relative RMS, got {distances}")
    runs = {name: functools.partial(solve, inputs) for name, solve in solves.items()}
    taken = turns(runs, CPU, range(rounds))
    return {
        name: {"seconds": min(ms) / 1e3, "relative_rms": distances[name]}
        for name, ms in taken.items()
    }


def peak_bytes(name: str, file: str, inputs: Path, threads: int) -> int:
    command = [sys.executable, "-m", "benchmarks.deployed", name, file, str(inputs), str(threads)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def table(results: Mapping[str, Any]) -> str:
    """Markdown, of all rows."""
    names = list(results["rows"][0]["runtimes"])
    lines = [f"| steps | audio | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for row in results["rows"]:
        cells = [
            f"{one['seconds']:.3f} s, {one['peak_bytes'] / 1e9:.2f} GB"
            for one in row["runtimes"].values()
        ]
        lines.append(f"| {row['nfe']} | {row['seconds']} s | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = facts.parser(__doc__, rounds=10)
    parser.add_argument("--seconds", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--nfe", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--exports", nargs="*", default=EXPORTS, choices=EXPORTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", default="f5_small", choices=("f5_small", "tiny"))
    parser.add_argument("--depth", type=int, default=4, help="blocks")
    parser.set_defaults(device="cpu", dtype="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)  # which AOTInductor compiles for
    told = {"threads": args.threads, "size": args.size, "depth": args.depth}
    found = facts.Report("deployment", args, **told)
    model, rate = build(args.size, CPU, torch.float32, args.depth)
    for nfe in args.nfe:
        with found.attempt(f"{nfe} steps"), tempfile.TemporaryDirectory() as folder:
            made = files(Baked.of(model, ["uniform"], nfe), ["ours", *args.exports], Path(folder))
            solves = {name: RUNTIMES[name](file, args.threads) for name, file in made.items()}
            for seconds in args.seconds:
                frames = round(seconds * rate)
                noise, given = request(model, 1, frames, frames // 3)
                inputs = {key: x.numpy() for key, x in {"noise": noise, **given}.items()}
                np.savez(saved := Path(folder) / "inputs.npz", **inputs)
                runtimes: Any = measure(solves, inputs, args.rounds)
                for name, row in runtimes.items():
                    row["peak_bytes"] = peak_bytes(name, made[name], saved, args.threads)
                row = {"nfe": nfe, "seconds": seconds, "frames": frames, "runtimes": runtimes}
                found.add(row, table({"rows": [row]}))
    if found.results["rows"]:
        print("", table(found.results), sep="\n")
    return found.finish()


if __name__ == "__main__":
    sys.exit(main())
