"""Whole-solver graphs against eager, torch.compile and the public recipe.

    python -m benchmarks.solver_graphs --out benchmarks/results/<device>/solver_graphs.json

Columns, all in one process, interleaved, on the same random weights and requests:

    eager           sampler.sample on the request's own shape
    compile         the same on torch.compile(model), shapes fixed
    compile+graph   that, the whole solve captured by torch.cuda.graph at the request's exact shape,
                    inputs copied in and out: what serving projects write by hand, per shape
    ours            GraphSampler on its default buckets

Every contender is compared with the float32 solve first; one that is more than twice as far from it
as the eager solve is marked and gets no ratio. `floor` is the larger of FLOPs and bytes over what
this device was measured to do in the same run, without `prepare`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

import imf_kernels
from benchmarks.timing import Ceilings, interleaved, milliseconds
from imf_kernels import grids
from imf_kernels.files import replacing
from imf_kernels.graphs import GraphSampler
from imf_kernels.models import Conditioning, DiT, DiTConfig, TextConfig
from imf_kernels.sampler import sample

SIZES = {
    "f5_base": ("f5_v1", {"dim": 1024, "depth": 22, "heads": 16}, 93.75),
    "cosyvoice3": ("cosyvoice3", {"dim": 1024, "depth": 22, "heads": 16}, 50.0),
    "tiny": ("f5_v1", {"dim": 64, "depth": 2, "heads": 1}, 93.75),
}
PROMPT_SECONDS = 3.3
Solve = Callable[[], Tensor]


def build(name: str, device: torch.device, dtype: torch.dtype) -> tuple[DiT, float]:
    """A student with random weights (an untrained one would answer 0), and its frames a second."""
    variant, sizes, rate = SIZES[name]
    text = TextConfig(vocab=2545) if variant.startswith("f5") else None
    torch.manual_seed(0)
    with device:
        model = DiT(DiTConfig.for_variant(variant, text=text, mixer=True, **sizes))
        for name, parameter in model.named_parameters():
            if "linear" in name or "proj_out" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    return model.to(dtype).eval().requires_grad_(False), rate


def request(model: DiT, rows: int, frames: int, prompt: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Noise, and the arguments of `prepare`."""
    device, channels = model.proj_out.weight.device, model.config.channels
    given = {
        "prompt": torch.randn(rows, frames, channels, device=device),
        "lengths": torch.full((rows,), frames, device=device),
    }
    given["prompt"][:, prompt:] = 0
    if model.text_embed is not None:
        given["text"] = torch.randint(2545, (rows, max(frames // 6, 1)), device=device)
    else:
        given["mu"] = torch.randn(rows, frames, channels, device=device)
        given["spks"] = torch.randn(rows, channels, device=device)
    return torch.randn(rows, frames, channels, device=device), given


def recipe(
    compiled: Any,
    noise: Tensor,
    prepared: Conditioning,
    cond: Callable[[], Conditioning],
    nfe: int,
) -> Solve:
    """The public recipe: a whole solve of the compiled model in one graph of this exact shape."""
    x = noise.clone()
    static = Conditioning({name: t.clone() for name, t in prepared.items()}, prepared.specs)
    steps = grids.uniform(nfe).to(noise.device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            sample(compiled, x, static, steps)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = sample(compiled, x, static, steps)

    def solve() -> Tensor:
        x.copy_(noise)
        for name, tensor in cond().items():
            static[name].copy_(tensor)
        graph.replay()
        return result.clone()

    return solve


def floor(model: DiT, rows: int, frames: int, nfe: int, ceilings: Ceilings) -> float:
    """Milliseconds of one solve at the device's limit: GEMMs, convolutions, attention, weights."""
    config = model.config
    dim, inner = config.dim, config.heads * config.head_dim
    per_frame = config.depth * (8 * dim * inner + 4 * config.ff_mult * dim * dim)
    per_frame += 2 * 2 * 31 * dim * dim // 16 + 4 * dim * config.channels
    flops = rows * frames * (per_frame + config.depth * 4 * frames * inner)
    weights = sum(
        p.nbytes
        for name, p in model.named_parameters()
        if "norm" not in name and "text" not in name
    )
    return 1e3 * nfe * max(flops / ceilings.flops, weights / ceilings.bandwidth)


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


class Shape(NamedTuple):
    """One request's shape, as a row of the results states it."""

    model: str
    nfe: int
    batch: int
    seconds: float
    prompt: float
    frames: int
    prompt_frames: int


def shapes(args: argparse.Namespace, name: str, nfe: int, rate: float) -> Iterator[Shape]:
    for batch, seconds, prompt in itertools.product(args.batch, args.seconds, args.prompt):
        prompt_frames = round(prompt * rate)
        frames = prompt_frames + round(seconds * rate)
        yield Shape(name, nfe, batch, seconds, prompt, frames, prompt_frames)


def contenders(
    model: DiT,
    compiled: Any,
    ours: GraphSampler,
    noise: Tensor,
    given: dict[str, Tensor],
    columns: Sequence[str],
    inside: bool,
) -> dict[str, Solve]:
    """What is timed, for `prepare` inside or outside of it."""
    nfe, prepared = ours.nfe, model.prepare(**given)

    def cond() -> Conditioning:
        return model.prepare(**given) if inside else prepared

    made: dict[str, Callable[[], Solve]] = {
        "eager": lambda: lambda: sample(model, noise, cond(), nfe=nfe),
        "compile": lambda: lambda: sample(compiled, noise, cond(), nfe=nfe),
        "compile+graph": lambda: recipe(compiled, noise, prepared, cond, nfe),
        "ours": lambda: (
            (lambda: ours.sample(noise, conditions=given))
            if inside
            else (lambda: ours.sample(noise, prepared))
        ),
    }
    return {name: make() for name, make in made.items() if name in columns}


def one_shape(
    args: argparse.Namespace,
    shape: Shape,
    model: DiT,
    exact: DiT,
    compiled: Any,
    ours: GraphSampler,
    ceilings: Ceilings,
) -> Iterator[dict[str, Any]]:
    noise, given = request(model, shape.batch, shape.frames, shape.prompt_frames)
    truth = sample(exact, noise, exact.prepare(**given), nfe=shape.nfe)
    for where in args.prepare:
        runs = contenders(model, compiled, ours, noise, given, args.columns, where == "inside")
        errors = {name: error(run(), truth) for name, run in runs.items()}
        times = interleaved(runs, noise.device, args.rounds)
        row = {
            **shape._asdict(),
            "prepare": where,
            "floor_ms": floor(model, shape.batch, shape.frames, shape.nfe, ceilings),
            "errors": errors,
            "wrong": [n for n, e in errors.items() if e > 2 * errors["eager"] + 1e-5],
            "ms": {name: taken._asdict() for name, taken in times.items()},
            "rtf": times["ours"].median / 1e3 / (shape.batch * shape.seconds),
        }
        print(line(row), flush=True)
        yield row


def new_grid(args: argparse.Namespace, ours: GraphSampler, rate: float) -> dict[str, float]:
    """What a request of one second pays for another grid than the request before it had."""
    noise, given = request(ours.model, 1, round(rate), 0)
    cond = ours.model.prepare(**given)
    turns = itertools.cycle(["uniform", "sway"])
    runs = {
        "same": lambda: ours.sample(noise, cond, "uniform"),
        "other": lambda: ours.sample(noise, cond, next(turns)),
    }
    ms = {name: [] for name in runs}
    for name, run in runs.items():  # not interleaved: each leaves the grid that the next one finds
        for _ in range(args.rounds + 3):
            ms[name].append(milliseconds(run, noise.device))
    return {name: statistics.median(values[3:]) for name, values in ms.items()}


def measure(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    ceilings = Ceilings.measure(device, dtype)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "imf_kernels": imf_kernels.__version__,
        },
        "backends": imf_kernels.backends(),
        "command": args.command,
        "ceilings": ceilings._asdict(),
        "solves": [],
        "new_grid_ms": {},
        "graphs": {},
    }
    for name in args.models:
        model, rate = build(name, device, dtype)
        exact = copy.deepcopy(model).float()
        compiled = torch.compile(model, dynamic=False)
        for nfe in args.nfe:
            label = f"{name}, NFE {nfe}"
            with GraphSampler(model, nfe) as ours:
                for shape in shapes(args, name, nfe, rate):
                    results["solves"] += one_shape(
                        args, shape, model, exact, compiled, ours, ceilings
                    )
                if nfe > 1:  # one step has one grid
                    results["new_grid_ms"][label] = new_grid(args, ours, rate)
                stats = ours.stats()
            results["graphs"][label] = {
                "captures": stats.captures,
                "bytes_held": stats.bytes_held,
                "fallbacks": dict(stats.fallbacks),
            }
        torch._dynamo.reset()
    return results


COLUMNS = ("eager", "compile", "compile+graph", "ours")
HEADER = "model       nfe batch  s+prompt  prepare     floor " + "".join(
    f"{name:>25s}" for name in COLUMNS
)


def line(row: dict[str, Any]) -> str:
    cells = []
    for name in COLUMNS:
        if name not in row["ms"]:
            cells.append("-")
        elif name in row["wrong"]:
            cells.append("WRONG")
        else:
            taken, eager = row["ms"][name]["median"], row["ms"]["eager"]["median"]
            cells.append(f"{taken:9.3f} {eager / taken:5.2f}x {taken / row['floor_ms']:6.1f}f")
    return (
        f"{row['model']:11s} {row['nfe']:3d} {row['batch']:5d} {row['seconds']:4g}+"
        f"{row['prompt']:<4g}  {row['prepare']:8s} {row['floor_ms']:8.3f} "
        + "".join(f"{cell:>25s}" for cell in cells)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--models", nargs="+", default=["f5_base", "cosyvoice3"], choices=SIZES)
    parser.add_argument("--seconds", nargs="+", type=float, default=[1, 3, 10, 30])
    parser.add_argument("--prompt", nargs="+", type=float, default=[0, PROMPT_SECONDS])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--nfe", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--prepare", nargs="+", default=["outside", "inside"])
    parser.add_argument("--columns", nargs="+", default=COLUMNS, choices=COLUMNS)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type != "cuda":
        args.columns = [name for name in args.columns if name != "compile+graph"]
    args.columns = [name for name in COLUMNS if name in {*args.columns, "eager", "ours"}]
    args.command = shlex.join(["python", "-m", "benchmarks.solver_graphs", *sys.argv[1:]])
    torch._dynamo.config.recompile_limit = 256
    print(f"{HEADER}\n(milliseconds, speed against eager, multiple of the floor)")
    with torch.no_grad():
        results = measure(args, device, getattr(torch, args.dtype))
    for label, ms in results["new_grid_ms"].items():
        print(f"{label}: {ms['same']:.3f} ms with the same grid, {ms['other']:.3f} ms with another")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(args.out) as temporary:
            temporary.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
