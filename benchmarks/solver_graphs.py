"""Whole-solver graphs against eager, torch.compile and the public recipe.

    python -m benchmarks.solver_graphs --out benchmarks/results/<device>/solver_graphs.json

Columns, all in one process, interleaved, on the same random weights and requests:

    eager           sampler.sample on the request's own shape
    compile         the same, the model in plain PyTorch under torch.compile, shapes fixed
    compile+graph   that, the whole solve captured by torch.cuda.graph at the request's exact shape,
                    inputs copied in and out: what serving projects write by hand, per shape
    ours            GraphSampler on its default buckets

Every contender is compared with plain PyTorch's float32 solve first; one that is more than twice as
far from it as plain PyTorch's solve in the same dtype is marked and gets no ratio. `floor` is the
larger of FLOPs and bytes over what this device was measured to do in the same run, without
`prepare`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import facts
from benchmarks.plain import Compiled, PlainDiT, plain, plainly
from benchmarks.timing import Ceilings, interleaved, milliseconds
from benchmarks.workload import PROMPT_SECONDS, SIZES, build, error, floor, request, wrong
from imf_kernels import grids
from imf_kernels.graphs import GraphSampler
from imf_kernels.models import Conditioning, DiT
from imf_kernels.sampler import sample

Solve = Callable[[], Tensor]


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


class Models(NamedTuple):
    """One model's weights in all the forms that a run needs."""

    fused: DiT
    plain: PlainDiT
    compiled: Compiled
    exact: PlainDiT

    @classmethod
    def of(cls, model: DiT) -> Models:
        twin = plain(model, masked=False)
        return cls(model, twin, Compiled(twin), plain(model, masked=False).float())


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
    where: str,
) -> dict[str, Solve]:
    """What is timed, for `prepare` inside or outside of it."""
    nfe, prepared, inside = ours.nfe, model.prepare(**given), where == "inside"

    def cond() -> Conditioning:
        return model.prepare(**given) if inside else prepared

    made: dict[str, Callable[[], Solve]] = {
        "eager": lambda: lambda: sample(model, noise, cond(), nfe=nfe),
        "compile": lambda: plainly(lambda: sample(compiled, noise, cond(), nfe=nfe)),
        "compile+graph": lambda: plainly(recipe)(compiled, noise, prepared, cond, nfe),
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
    models: Models,
    ours: GraphSampler,
    ceilings: Ceilings,
) -> Iterator[dict[str, Any]]:
    model, nfe = models.fused, shape.nfe
    noise, given = request(model, shape.batch, shape.frames, shape.prompt_frames)
    truth = plainly(sample)(models.exact, noise, models.exact.prepare(**given), nfe=nfe)
    plain_result = plainly(sample)(models.plain, noise, models.plain.prepare(**given), nfe=nfe)
    allowed = error(plain_result, truth)
    for where in args.prepare:
        runs = contenders(model, models.compiled, ours, noise, given, args.columns, where)
        errors = {name: error(run(), truth) for name, run in runs.items()}
        times = interleaved(runs, noise.device, args.rounds)
        yield {
            **shape._asdict(),
            "prepare": where,
            "floor_ms": floor(model, [shape.frames] * shape.batch, nfe, ceilings),
            "errors": {"plain": allowed, **errors},
            "wrong": [name for name, e in errors.items() if wrong([e], [allowed])],
            "ms": {name: taken._asdict() for name, taken in times.items()},
            "rtf": times["ours"].median / 1e3 / (shape.batch * shape.seconds),
        }


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


def measure(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> int:
    ceilings = Ceilings.measure(device, dtype)
    more: dict[str, Any] = {"ceilings": ceilings._asdict(), "new_grid_ms": {}, "graphs": {}}
    found = facts.Report("solver_graphs", args, **more)
    for name, nfe in itertools.product(args.models, args.nfe):
        model, rate = build(name, device, dtype)
        models, label = Models.of(model), f"{name}, NFE {nfe}"
        with found.attempt(label), GraphSampler(model, nfe) as ours:
            for shape in shapes(args, name, nfe, rate):
                with found.attempt(str(shape)):
                    for row in one_shape(args, shape, models, ours, ceilings):
                        found.add(row, line(row))
                        if row["wrong"]:
                            found.fail(f"{shape}", f"far from the float32 solve: {row['wrong']}")
            if nfe > 1:  # one step has one grid
                ms = more["new_grid_ms"][label] = new_grid(args, ours, rate)
                print(f"{label}: {ms['same']:.3f} ms, with another grid {ms['other']:.3f} ms")
            stats = ours.stats()
            more["graphs"][label] = {
                "captures": stats.captures,
                "bytes_held": stats.bytes_held,
                "fallbacks": dict(stats.fallbacks),
            }
        facts.release()
    return found.finish()


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


def parser() -> argparse.ArgumentParser:
    parser = facts.parser(__doc__, rounds=30)
    parser.add_argument("--models", nargs="+", default=["f5_base", "cosyvoice3"], choices=SIZES)
    parser.add_argument("--seconds", nargs="+", type=float, default=[1, 3, 10, 30])
    parser.add_argument("--prompt", nargs="+", type=float, default=[0, PROMPT_SECONDS])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--nfe", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--prepare", nargs="+", default=["outside", "inside"])
    parser.add_argument("--columns", nargs="+", default=COLUMNS, choices=COLUMNS)
    return parser


def main() -> int:
    args = parser().parse_args()
    device = torch.device(args.device)
    if device.type != "cuda":
        args.columns = [name for name in args.columns if name != "compile+graph"]
    args.columns = [name for name in COLUMNS if name in {*args.columns, "eager", "ours"}]
    torch._dynamo.config.recompile_limit = 256
    print(f"{HEADER}\n(milliseconds, speed against eager, multiple of the floor)")
    with torch.no_grad():
        return measure(args, device, getattr(torch, args.dtype))


if __name__ == "__main__":
    sys.exit(main())
