"""One evaluation of the model in a CUDA graph, against the device's limits and library kernels.

    ours            the fused model from step tables, as a student's solve evaluates it
    ours, fp8       the same in FP8, every layer
    plain           plain PyTorch on the same weights
    torch.compile   that, compiled

"floor_seconds" are FLOPs or weights over what this device was measured to do in the same run;
"library_seconds" what the matrix products and the attention alone take at these shapes, of each the
fastest that libraries (and, of attention, this one) have: every block's products on weights of its
own, as a model's are cold. "kernels" is what a profiler saw of an evaluation of ours without a
graph. A ragged batch is packed for ours and padded for the others.

test_ranges measures what a range of `imf_kernels.profiling` costs: off, as they are by default, and
on without anybody who listens, against a loop with nothing in it.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.contest import Conditions, Contest, Row, Unavailable
from benchmarks.launches import launches
from benchmarks.plain import plain, plainly
from benchmarks.timing import Ceilings, Run, graphed, turns_on_device
from benchmarks.workload import (
    PROMPT_SECONDS,
    allowed,
    build,
    error,
    limit,
    ragged_lengths,
    request,
    work,
)
from imf_kernels import ops, profiling
from imf_kernels.models import DiT, DiTConfig
from imf_kernels.ops import _flash
from imf_kernels.ops.fp8_linear import runs_on
from imf_kernels.rows import Rows

FP8_ERROR = 0.05


def rows(conditions: Conditions) -> list[Row]:
    def row(model: str, seconds: float, batch: int = 1, **told: Any) -> Row:
        shape = {"model": model, "batch": batch, "seconds": seconds, "prompt": PROMPT_SECONDS}
        return conditions.row(**shape | told)

    def ragged(model: str, longest: float, frames: int) -> Row:
        return conditions.row(model=model, ragged=True, longest=longest, frames=frames)

    if conditions.tiny:
        return [row("tiny", 0.3, 2, prompt=0.2), ragged("tiny", 0.5, 80)]
    if conditions.selection == "cpu":
        return [row("f5_base", 3.0, depth=4)]
    if conditions.selection == "gpu":
        shapes = (10.0, 1), (1.0, 1), (3.0, 1), (30.0, 1), (10.0, 8)
    else:
        shapes = tuple((seconds, batch) for batch in (1, 8) for seconds in (1.0, 3.0, 10.0, 30.0))
    return [*(row("f5_base", *shape) for shape in shapes), ragged("f5_base", 33.3, 16384)]


def compiles(row: Row, conditions: Conditions) -> bool:
    """Whether a row has torch.compile too, which takes a minute of every row."""
    told = row.get("seconds"), row.get("batch"), row.get("dependent_launch")
    return conditions.selection == "full" or told == (10.0, 1, None)


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
        # a library of another PyTorch or CUDA fails to load in any of these ways
        with contextlib.suppress(ImportError, OSError, AttributeError, RuntimeError):
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


def fastest(candidates: dict[str, Run], device: torch.device) -> tuple[str, float]:
    """The fastest that runs here, and its seconds."""
    graphs = {}
    for name, run in candidates.items():
        with contextlib.suppress(RuntimeError):  # a backend that does not take these tensors
            graphs[name] = graphed(run, device)
            graphs[name]()
    taken = turns_on_device(graphs, device, range(5))
    best = min(taken, key=lambda name: statistics.median(taken[name]))
    return best, statistics.median(taken[best]) / 1e3


def library(model: DiT, batch: int, frames: int, device: torch.device) -> dict[str, Any]:
    """The best matrix products and attention, each, and what they take in all."""
    best, cuda = {}, device.type == "cuda"
    with device:
        for name, size in products(model.config).items():
            best[name] = fastest(product_candidates(batch * frames, size, model.dtype), device)
        best["attention"] = fastest(attention_candidates(model, batch, frames, cuda), device)
    parts = {name: {"best": kind, "seconds": seconds} for name, (kind, seconds) in best.items()}
    return {"library_seconds": sum(s for _, s in best.values()), "library": parts}


@functools.lru_cache(maxsize=1)
def models(name: str, device: torch.device, dtype: torch.dtype, depth: int | None) -> Any:
    model, rate = build(name, device, dtype, depth)
    return model, plain(model), plain(model).float(), rate


@pytest.mark.rows(of=rows)
def test_evaluation(row: Row, contest: Contest, ceilings: Ceilings) -> None:
    conditions, device = contest.conditions, contest.device
    model, twin, exact, rate = models(row["model"], device, conditions.dtype, row.get("depth"))
    ragged = "ragged" in row
    if ragged:
        longest = round(row["longest"] * rate)
        lengths = ragged_lengths(row["frames"], longest // 10, longest)
    else:
        longest = round(row["prompt"] * rate) + round(row["seconds"] * rate)
        lengths = [longest] * row["batch"]
    x, given = request(model, len(lengths), max(lengths), min(lengths) // 4, lengths)
    twin.masked = exact.masked = ragged
    padded = model.lay_out(model.prepare(**given), len(lengths))
    times = torch.zeros(1, device=device), torch.ones(1, device=device)
    modulation = model.tables(*times).at(0)
    truth = plainly(exact.evaluate)(x, exact.tables(*times).at(0), exact.prepare(**given))
    plain_run = plainly(lambda: twin.evaluate(x, modulation, padded))
    bound = allowed(error(plain_run(), truth))
    flops, nbytes = work(model, lengths, 1)
    frames = {"frames": sum(lengths)}
    told = {"flops": flops, "bytes": nbytes, "floor_seconds": limit(flops, nbytes, ceilings)}

    def ours(used: DiT) -> Run:
        cond = used.lay_out(used.prepare(**given, packed=ragged), len(lengths))
        return lambda: used.evaluate(x, modulation, cond)

    def fp8() -> Run:
        if not (runs_on(device) or conditions.tiny):
            raise Unavailable("the device has no products in FP8")
        return ours(model.fp8())

    def compiled() -> Run:
        if not compiles(row, conditions):
            raise Unavailable("compilation takes a minute (full selection)")
        evaluate = torch.compile(twin.evaluate, dynamic=False)
        return plainly(lambda: evaluate(x, modulation, padded))

    def enter(name: str, make: Callable[[], Run], bound: float, role: str) -> None:
        contest.enter(
            name,
            lambda: graphed(make(), device),
            lambda velocity: (error(velocity, truth), bound),
            role=role,
            **frames | ({} if name == "ours, fp8" else told),  # FLOPs of the row's dtype
        )

    enter("ours", lambda: ours(model), bound, "ours")
    enter("ours, fp8", fp8, max(FP8_ERROR, bound), "ours")
    enter("plain", lambda: plain_run, max(FP8_ERROR, bound), "baseline")
    enter("torch.compile", compiled, bound, "peer")
    if not ragged:
        contest.tell("ours", **library(model, len(lengths), longest, device))
    run = ours(model)
    with contextlib.suppress(RuntimeError):  # where a profiler may not look
        contest.tell("ours", kernels=launches(run, device))
    contest.time(None)


@pytest.mark.rows(of=lambda conditions: [conditions.row(range="evaluation")])
def test_ranges(row: Row, contest: Contest) -> None:
    calls = 1000

    def nothing() -> None:
        for _ in range(calls):
            pass

    def ranges(to: str | None) -> Run:
        def run() -> bool:
            if to is not None:
                profiling.enable(to)
            for _ in range(calls):
                with profiling.span(row["range"]):
                    pass
            enabled = profiling.enabled()
            profiling.disable()
            return enabled

        profiling.disable()
        return run

    contest.enter("no range", lambda: nothing, lambda _: (0.0, 0.0), role="baseline")
    for name, to in (("ours, off", None), ("ours, nvtx", "nvtx"), ("ours, torch", "torch")):
        contest.enter(
            name,
            functools.partial(ranges, to),
            lambda enabled, to=to: (float(enabled != (to is not None)), 0.0),
            role="ours" if to is None else "peer",
        )
    contest.time(calls=calls, share=0.25)
