"""One evaluation of the model in a CUDA graph, against the floor and the best library kernels.

    python -m benchmarks.evaluation --out benchmarks/results/<device>/evaluation.json

    eager, compile  plain PyTorch on the same weights, and that under torch.compile, in a graph too
    ours            the fused model from step tables, as a student's solve evaluates it
    fp8             the same in FP8, every layer
    floor           FLOPs or weights over what this device was measured to do in the same run
    library         what the matrix products and the attention alone take at these shapes, of each
                    the fastest that libraries (and, of attention, this one) have: every block's
                    products on weights of its own, as a model's are cold

After the batches of equal rows comes a ragged one, packed for ours and FP8 and padded for the
others. Results farther from plain PyTorch's float32 than twice its own in the same dtype are
failures, and so is FP8 that is more than 5 % off.
`kernels` of a row is what a profiler saw of one evaluation of ours without a graph.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks import facts
from benchmarks.plain import PlainDiT, plain, plainly
from benchmarks.timing import Ceilings, Run, graphed, on_device, synchronize
from benchmarks.workload import (
    PROMPT_SECONDS,
    build,
    error,
    floor,
    ragged_lengths,
    request,
    wrong,
)
from imf_kernels import ops
from imf_kernels.models import DiT, DiTConfig
from imf_kernels.ops import _flash
from imf_kernels.ops.fp8_linear import runs_on
from imf_kernels.rows import Rows

COLUMNS = ("eager", "compile", "ours", "fp8")
FP8_ERROR = 0.05


def products(config: DiTConfig) -> dict[str, tuple[int, int, int]]:
    """Inputs, outputs and count of every matrix product of an evaluation."""
    dim, inner, depth = config.dim, config.heads * config.head_dim, config.depth
    return {
        "state": (config.channels, dim, 1),
        "qkv": (dim, 3 * inner, depth),
        "attention's output": (inner, dim, depth),
        "feed-forward up": (dim, config.ff_mult * dim, depth),
        "feed-forward down": (config.ff_mult * dim, dim, depth),
        "velocity": (dim, config.channels, 1),
    }


def product_candidates(
    frames: int, size: tuple[int, int, int], dtype: torch.dtype
) -> dict[str, Run]:
    """All products of this size that an evaluation has, one after the other."""
    inputs, outputs, count = size
    x, bias = torch.randn(frames, inputs, dtype=dtype), torch.randn(outputs, dtype=dtype)
    weights = torch.randn(count, outputs, inputs, dtype=dtype)
    return {
        "matmul": lambda: _each(lambda weight: x @ weight.mT, weights),
        "linear": lambda: _each(lambda weight: F.linear(x, weight, bias), weights),
    }


def attention_candidates(model: DiT, rows: int, frames: int, cuda: bool) -> dict[str, Run]:
    """The attention of every block, one after the other."""
    config = model.config
    qkv = torch.randn(rows * frames, 3, config.heads, config.head_dim, dtype=model.dtype)
    layout = Rows.padded(torch.full((rows,), frames), frames)
    heads = qkv.unflatten(0, (rows, frames)).transpose(1, 3).unbind(2)

    def sdpa(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*heads)

    blocks = range(config.depth)
    candidates: dict[str, Run] = {
        "flash": lambda: _each(lambda _: sdpa(SDPBackend.FLASH_ATTENTION), blocks),
        "ours": lambda: _each(lambda _: ops.attention(qkv, layout), blocks),
    }
    for name in _flash.LIBRARIES if cuda else ():
        with contextlib.suppress(ImportError):
            run = _flash.LIBRARIES[name].load()
            candidates[name] = functools.partial(_library, run, qkv, layout, config.depth)
    if cuda:
        candidates["cudnn"] = lambda: _each(lambda _: sdpa(SDPBackend.CUDNN_ATTENTION), blocks)
    return candidates


def _library(run: _flash.Forward, qkv: Tensor, layout: Rows, depth: int) -> Tensor:
    return _each(lambda _: run(*qkv.unbind(1), layout, qkv.shape[3] ** -0.5)[0], range(depth))


def _each(run: Callable[[Any], Tensor], over: Iterable[Any]) -> Tensor:
    """The last result; those before it give their memory back, as a model's do."""
    for item in over:
        result = run(item)
    return result


def fastest(
    found: facts.Report, label: str, candidates: dict[str, Run], device: torch.device, rounds: int
) -> dict[str, Any]:
    graphs = {}
    for name, run in candidates.items():
        with found.attempt(f"{label}, {name}"):
            graphs[name] = graphed(run, device)
    ms = {name: times.median for name, times in on_device(graphs, device, rounds).items()}
    best = min(ms, key=lambda name: ms[name])
    return {"best": best, "ms": ms[best], "candidates": ms}


def library(
    found: facts.Report,
    label: str,
    model: DiT,
    rows: int,
    frames: int,
    device: torch.device,
    rounds: int,
) -> dict[str, Any]:
    """Milliseconds that the best matrix products and attention take, each and in all."""
    parts = {}
    for name, size in products(model.config).items():
        candidates = product_candidates(rows * frames, size, model.dtype)
        parts[name] = fastest(found, f"{label}, {name}", candidates, device, rounds)
    candidates = attention_candidates(model, rows, frames, device.type == "cuda")
    parts["attention"] = fastest(found, f"{label}, attention", candidates, device, rounds)
    return {"ms": sum(part["ms"] for part in parts.values()), "parts": parts}


def kernels(run: Run, device: torch.device, most: int = 12) -> dict[str, Any]:
    """What one call launches, by the profiler; on the CPU, which has no kernels, its operations."""
    run()
    synchronize(device)
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as trace:
        run()
        synchronize(device)
    kind, total = DeviceType.CPU, "self_cpu_time_total"
    if cuda:
        kind, total = DeviceType.CUDA, "self_device_time_total"
    entries = [e for e in trace.key_averages() if e.device_type == kind]
    launched = [e for e in entries if not e.key.startswith(("Memcpy", "Memset"))]
    if not launched:
        raise RuntimeError("the profiler saw no kernel")
    launched.sort(key=lambda entry: getattr(entry, total), reverse=True)
    us = sum(getattr(entry, total) for entry in entries)
    top = [
        {"name": e.key, "count": e.count, "us": getattr(e, total), "share": getattr(e, total) / us}
        for e in launched[:most]
    ]
    count = sum(e.count for e in launched)
    return {"count": count, "copies": sum(e.count for e in entries) - count, "us": us, "top": top}


def measure(
    args: argparse.Namespace,
    found: facts.Report,
    model: DiT,
    twin: PlainDiT,
    exact: PlainDiT,
    label: str,
    lengths: list[int],
    ceilings: Ceilings,
) -> None:
    device, batch, frames = torch.device(args.device), len(lengths), max(lengths)
    ragged = min(lengths) < frames
    x, given = request(model, batch, frames, min(lengths) // 4, lengths)
    twin.masked = exact.masked = ragged
    cond, padded = model.prepare(**given, packed=ragged), model.prepare(**given)
    times = torch.zeros(1, device=device), torch.ones(1, device=device)
    modulation = model.tables(*times).at(0)
    eighth = model.fp8() if "fp8" in args.columns else model
    own = eighth.prepare(**given, packed=ragged)
    runs: dict[str, Run] = {
        "eager": plainly(lambda: twin.evaluate(x, modulation, padded)),
        "compile": plainly(
            functools.partial(torch.compile(twin.evaluate, dynamic=False), x, modulation, padded)
        ),
        "ours": lambda: model.evaluate(x, modulation, cond),
        "fp8": lambda: eighth.evaluate(x, modulation, own),
    }
    truth = plainly(exact.evaluate)(x, exact.tables(*times).at(0), exact.prepare(**given))
    allowed = error(runs["eager"](), truth)
    errors, graphs = {}, {}
    for name in args.columns:
        with found.attempt(f"{label}, {name}"):
            replay = graphed(runs[name], device)
            errors[name] = error(replay(), truth)
            if wrong([errors[name]], [FP8_ERROR / 2 if name == "fp8" else allowed]):
                raise ArithmeticError(f"error {errors[name]}, that of plain PyTorch {allowed}")
            graphs[name] = replay
    if "ours" not in graphs:
        return
    ms = {name: t._asdict() for name, t in on_device(graphs, device, args.rounds).items()}
    del graphs, replay
    ours, limit = ms["ours"]["median"], floor(model, lengths, 1, ceilings)
    row: dict[str, Any] = {
        "shape": label,
        "batch": batch,
        "frames": sum(lengths),
        "lengths": lengths,
        "floor_ms": limit,
        "ms": ms,
        "errors": {"plain": allowed, **errors},
        "of_floor": ours / limit,
    }
    if not ragged:
        with found.attempt(f"{label}, library"), device:
            best = library(found, label, model, batch, frames, device, args.rounds)
            row |= {"library": best, "of_library": ours / best["ms"]}
    with found.attempt(f"{label}, profiler"):
        row["kernels"] = kernels(runs["ours"], device)
    found.add(row, line(row))


HEADER = f"{'shape':<22} frames {'floor':>8}{'library':>9}" + "".join(f"{c:>10}" for c in COLUMNS)
HEADER += "   of floor   of library   kernels"


def line(row: dict[str, Any]) -> str:
    best, seen = row.get("library"), row.get("kernels")
    cells = [f"{row['ms'][c]['median']:.3f}" if c in row["ms"] else "-" for c in COLUMNS]
    return (
        f"{row['shape']:<22} {row['frames']:6d} {row['floor_ms']:8.3f}"
        f"{best['ms'] if best else float('nan'):9.3f}"
        + "".join(f"{cell:>10}" for cell in cells)
        + f"{row['of_floor']:10.2f}x{row.get('of_library', float('nan')):12.2f}x"
        f"{seen['count'] if seen else 0:10d}"
    )


def emulated(device: torch.device) -> bool:
    """Whether a GPU has no FP8 products, and an emulation would be timed."""
    return device.type == "cuda" and not runs_on(device)


def parser() -> argparse.ArgumentParser:
    found = facts.parser(__doc__, rounds=20)
    found.add_argument("--size", default="f5_base", choices=("f5_base", "tiny"))
    found.add_argument("--seconds", nargs="+", type=float, default=[1, 3, 10, 30])
    found.add_argument("--prompt", type=float, default=PROMPT_SECONDS)
    found.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    found.add_argument("--packed", type=int, default=16384, help="frames of the ragged batch, or 0")
    found.add_argument("--columns", nargs="+", default=COLUMNS, choices=COLUMNS)
    return found


def main() -> int:
    args = parser().parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    wanted = {*args.columns, "ours"} - ({"fp8"} if emulated(device) else set())
    args.columns = [name for name in COLUMNS if name in wanted]
    ceilings = Ceilings.measure(device, dtype)
    found = facts.Report("evaluation", args, ceilings=ceilings._asdict())
    print(f"{HEADER}\n(milliseconds; of ours: multiples and kernels)")
    with torch.no_grad():
        model, rate = build(args.size, device, dtype)
        twin, exact = plain(model, masked=False), plain(model, masked=False).float()
        shapes = {}
        for batch, seconds in itertools.product(args.batch, args.seconds):
            frames = round(seconds * rate) + round(args.prompt * rate)
            shapes[f"{seconds:g} s, batch {batch}"] = [frames] * batch
        if args.packed:
            longest = max(args.seconds) + args.prompt
            bounds = round(args.prompt * rate), round(longest * rate)
            shapes["ragged, packed"] = ragged_lengths(args.packed, *bounds)
        for label, lengths in shapes.items():
            with found.attempt(label):
                measure(args, found, model, twin, exact, label, lengths, ceilings)
            facts.release()
    return found.finish()


if __name__ == "__main__":
    sys.exit(main())
