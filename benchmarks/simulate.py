"""What a solve would take on a card that is not here, operation by operation.

    python -m benchmarks.simulate                    all cards
    python -m benchmarks.simulate --card H200 --rows  and every operation of every case

A solve runs on the CPU with its Triton kernels compiled for the card and not launched, and without
its matrix products, so every operation has the shapes, and every kernel the grid, warps, registers
and shared memory that it has there. Microseconds, from these:

    floor       the longer of FLOPs and bytes at the card's ceilings, all bytes from its memory
    waves       the same dealt to multiprocessors whole: a product's tiles, and the blocks of our
                attention and convolutions. A multiprocessor runs its own one after the other, our
                blocks at `OF_KERNELS` of its ceiling, however many of them are resident
    launched    with `LAUNCH` for every kernel of a graph

It knows nothing of latencies, caches and overlap. It says which operations are far from their own
floor and why, what a change may gain at most, and what a measurement is to be held against.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._pytree import tree_map_only
from triton.runtime import driver

import imf_kernels
from benchmarks import facts
from benchmarks.operations import Operation, Recording
from benchmarks.timing import Ceilings
from benchmarks.workload import build, floor, request
from imf_kernels import grids
from imf_kernels.graphs import buckets
from imf_kernels.models import Baked
from imf_kernels.ops import _attention_kernels as attention
from imf_kernels.ops import _triton
from imf_kernels.solver import euler
from tests import aot


class Card(NamedTuple):
    """Ceilings a second, and a multiprocessor's shared memory; the rest is alike on all."""

    architecture: int
    multiprocessors: int
    flops: float
    bandwidth: float
    shared: int


CARDS = {
    "H200": Card(90, 132, 790e12, 4.3e12, 228 * 1024),  # bf16 product and copy as measured on one
    "A100": Card(80, 108, 250e12, 2.0e12, 164 * 1024),  # 80 GB: what is reachable; data sheet
}
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
SPLITS = 1, 2, 4, 8
"""Of a library's products: their tiles, and the parts of a split inner dimension."""
SMALL = 0.75
"""Of the ceiling: what tiles below 128 x 128 reach."""
OF_KERNELS = 0.57
"""Of the ceiling: 450 of 790 TFLOP/s, flash attention's on an H200."""
LAUNCH = 2e-6
SEVERAL = {"aten.masked_fill": 2, "aten.constant_pad_nd": 2}
"""Operations of PyTorch's that are more kernels than one: a copy, or a fill, and what they do."""


class Kernel(NamedTuple):
    """A launch: its blocks, and what each needs."""

    name: str
    blocks: int
    warps: int
    registers: int
    shared: int

    def resident(self, card: Card) -> int:
        """Blocks on a multiprocessor at once. Each of its four parts has a fourth of the registers,
        given by 256 a warp."""
        registers = -(-self.registers * 32 // 256) * 256
        warps = min(WARPS, 4 * (REGISTERS // 4 // registers))
        shared = self.shared + 1024  # the driver's
        return min(BLOCKS, warps // self.warps, card.shared // shared)


class Timed(NamedTuple):
    """An operation and its kernels on a card, seconds."""

    operation: Operation
    kernels: tuple[Kernel, ...]
    launches: int
    floor: float
    waves: float


class Dry(Recording):
    """Also each operation's Triton kernels, compiled for a card; they write nothing."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card
        self.kernels: list[tuple[Kernel, ...]] = []
        self.launched: list[Kernel] = []
        self.known: dict[bytes, int] = {}
        self.patches = contextlib.ExitStack()

    def __enter__(self) -> Dry:
        driver.set_active(aot.NoDevice(self.card.architecture))
        for patch in (
            mock.patch.object(_triton, "launcher", self._launch),
            mock.patch("imf_kernels.dispatch.INTERPRETED", True),  # a GPU; no kernel runs
            mock.patch("imf_kernels.ops.linear._epilogue_is_tanh", return_value=True),
            mock.patch("imf_kernels.ops.fp8_linear.runs_on", return_value=True),
            mock.patch("imf_kernels.checks.readable", return_value=False),
            imf_kernels.backend("triton"),
        ):
            self.patches.enter_context(patch)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patches.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        before, self.launched = len(self.operations), []
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self.operations) > before:
            self.kernels.append(tuple(self.launched))
        return out

    def run(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """A product's result means nothing here."""
        if str(func.overloadpacket) not in PRODUCTS:
            return super().run(func, args, kwargs)
        args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return torch.empty_like(func(*args, **kwargs), device="cpu")

    def _launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        binary = kernel.warmup(*args, grid=grid, **options)
        cubin, needs = binary.asm["cubin"], binary.metadata
        if cubin not in self.known:
            self.known[cubin] = aot.resources(cubin)["reg"]
        name, blocks = kernel.fn.__name__.strip("_"), math.prod(grid)
        if kernel is attention._forward_kernel:
            blocks -= math.prod(grid[:2])  # the last plane of its grid only clears padding
        self.launched.append(Kernel(name, blocks, needs.num_warps, self.known[cubin], needs.shared))

    def timed(self) -> list[Timed]:
        both = zip(self.operations, self.kernels, strict=True)
        return [timed(operation, kernels, self.card) for operation, kernels in both]


def timed(operation: Operation, kernels: Sequence[Kernel], card: Card) -> Timed:
    """One operation on a card."""
    fp8 = 2 if operation.name == "aten._scaled_mm" else 1  # times as many FLOPs
    moving, computing = operation.nbytes / card.bandwidth, operation.flops / fp8 / card.flops
    least = max(moving, computing)
    launches = max(len(kernels), SEVERAL.get(operation.name, 1))
    sizes = product(operation)
    if sizes is not None:
        computing, launches = min(
            (_tiled(sizes, *how, card) for how in itertools.product(TILES, SPLITS)),
            key=lambda made: made[0] + made[1] * LAUNCH,
        )
        computing /= fp8
    elif kernels and operation.flops:
        blocks = max(kernel.blocks for kernel in kernels)
        dealt = math.ceil(blocks / card.multiprocessors) * card.multiprocessors
        computing *= dealt / blocks / OF_KERNELS
    elif operation.flops:
        computing /= OF_KERNELS
    return Timed(operation, tuple(kernels), launches, least, max(moving, computing))


def product(operation: Operation) -> tuple[int, int, int] | None:
    """Rows, inner and outputs of a matrix product; None: it is none."""
    at = PRODUCTS.get(operation.name)
    if at is None:
        return None
    (m, k), (_, n) = operation.shapes[at : at + 2]
    return m, k, n


PRODUCTS = {"aten.mm": 0, "aten._scaled_mm": 0, "aten.addmm": 1, "aten._addmm_activation": 1}
"""Matrix products, and where the first factor is among their arguments."""


def _tiled(
    sizes: tuple[int, int, int], tile: tuple[int, int], split: int, card: Card
) -> tuple[float, int]:
    """Seconds of a product in whole waves of tiles, a tile of each multiprocessor, and its kernels:
    the partial sums of a split inner dimension, in float32, are added by another."""
    m, k, n = sizes
    tiles = math.ceil(m / tile[0]) * math.ceil(n / tile[1]) * split
    waves = math.ceil(tiles / card.multiprocessors)
    reached = card.flops * (1.0 if math.prod(tile) >= 128 * 128 else SMALL)
    computing = waves * card.multiprocessors * 2 * math.prod(tile) * k / split / reached
    if split == 1:
        return computing, 1
    return computing + 8 * split * m * n / card.bandwidth, 2


def grouped(operations: Sequence[Timed], card: Card) -> list[dict[str, Any]]:
    """Operations that are alike as one row, the longest first; microseconds of all of a row."""
    rows: dict[tuple[Any, ...], list[Timed]] = {}
    for one in operations:
        sizes = product(one.operation)
        rows.setdefault((one.operation.name, sizes, one.operation.nbytes), []).append(one)
    found = [_row(those, card) for those in rows.values()]
    return sorted(found, key=lambda row: row["launched"], reverse=True)


def _row(those: Sequence[Timed], card: Card) -> dict[str, Any]:
    one, count = those[0], len(those)
    name, sizes = one.operation.name, product(one.operation)
    flops, nbytes = one.operation.flops, one.operation.nbytes
    return {
        "operation": name if sizes is None else f"{name} {' x '.join(map(str, sizes))}",
        "count": count,
        "launches": count * one.launches,
        "flops": count * flops,
        "bytes": count * nbytes,
        "bound": "FLOPs" if flops / card.flops > nbytes / card.bandwidth else "bytes",
        "blocks": [kernel.blocks for kernel in one.kernels],
        "resident": [kernel.resident(card) for kernel in one.kernels],
        "floor": round(1e6 * count * one.floor, 3),
        "waves": round(1e6 * count * one.waves, 3),
        "launched": round(1e6 * count * (one.waves + one.launches * LAUNCH), 3),
    }


TIMES = "floor", "waves", "launched"


def total(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    keys = ("count", "launches", "flops", "bytes", *TIMES)
    return {key: sum(row[key] for row in rows) for key in keys}


def cases(model: Any, card: Card) -> Iterator[tuple[str, Callable[[], Any], list[int], int]]:
    """What there are aims for: a name, what runs, the frames of every row and branch, the NFE."""
    ten, rows = [1250], [1024] * 16
    packed = {"packed": sum(rows)}
    yield "evaluation, 10 s after a prompt of 3.3 s", evaluation(model, ten), ten, 1
    yield "evaluation, 16 packed rows", evaluation(model, rows, **packed), rows, 1
    if card.architecture >= aot.FP8_FROM:
        fp8 = model.fp8()
        yield "evaluation, 16 packed rows, FP8", evaluation(fp8, rows, **packed), rows, 1
    batch = [960] * 40
    guided = {"guided": True, "packed": sum(batch)}
    yield "guided evaluation, 40 packed rows", evaluation(model, batch, **guided), 2 * batch, 1
    for what, frames, prompt in (
        ("10 s after a prompt of 3.3 s", 1250, 312),
        ("1 s after a prompt of 3.3 s", 406, 312),
        ("1 s without a prompt", 94, 0),
    ):
        yield f"solve, {what}", solve(model, frames, prompt), [frames], 3


def evaluation(model: Any, lengths: Sequence[int], **how: Any) -> Callable[[], Any]:
    """One evaluation from step tables, within a solve."""
    x, given = request(model, len(lengths), max(lengths), max(lengths) // 4, lengths)
    modulation = model.tables(torch.zeros(1), torch.ones(1)).at(0)
    cond = model.lay_out(model.prepare(**given, **how), len(lengths))
    return lambda: model.evaluate(x, modulation, cond)


def solve(model: Any, frames: int, prompt: int, nfe: int = 3) -> Callable[[], Any]:
    """`prepare` and all steps, as a `GraphSampler` replays them: in its bucket, with its grid's
    tables at hand."""
    bucket = buckets.choose(buckets.DEFAULT, [frames], frames)
    assert bucket is not None
    x, given = request(model, 1, bucket.frames, prompt, [frames])
    grid = grids.uniform(nfe)
    tables = model.tables(grid[:-1], grid[1:])

    def run() -> Any:
        cond = model.lay_out(model.prepare(**given), 1)
        x.copy_(
            euler(
                lambda k, state: model.evaluate(state, tables.at(k), cond),
                x,
                grid.diff()[:, None],
                lengths=cond["lengths"],
                model_dtype=model.dtype,
                accumulate=False,
            ).x
        )

    return run


def weights(model: Any) -> dict[str, float]:
    """Bytes of a student baked for 3 steps, of those that it was trained with."""
    bf16, fp8 = (Baked.of(each, ["uniform"], 3) for each in (model, model.fp8()))
    return {"baked": bf16.nbytes / bf16.nbytes_before, "FP8": fp8.nbytes / bf16.nbytes_before}


def simulated(model: Any, card: Card) -> Iterator[dict[str, Any]]:
    """Every case on a card: its rows, and its limit, the floor of what it cannot do without."""
    ceilings = Ceilings(card.flops, card.bandwidth)
    for what, run, lengths, nfe in cases(model, card):
        with Dry(card) as dry:
            run()
        rows = grouped(dry.timed(), card)
        limit = 1e6 * floor(model, lengths, nfe, ceilings)
        yield {"what": what, "frames": sum(lengths), "limit": limit, **total(rows), "rows": rows}


def lines(case: Mapping[str, Any], every: bool) -> Iterator[str]:
    """The case, and maybe its rows."""
    for row in (case, *(case["rows"] if every else ())):
        name = row.get("what") or f"  {row['operation']}"
        numbers = row["launches"], *(row[key] for key in TIMES)
        limit = f"{row['limit']:>9.0f}" if "limit" in row else f"{row['bound']:>9}"
        yield f"{name:<52}{limit}" + "".join(f"{number:>9.0f}" for number in numbers)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--card", nargs="+", default=list(CARDS), choices=CARDS)
    parser.add_argument("--rows", action="store_true", help="print every operation")
    parser.add_argument("--out", type=Path, help="a folder, for a JSON file of each card")
    args = parser.parse_args()
    versions = facts.versions("torch", "triton")
    model, _ = build("f5_base", torch.device("cpu"), torch.bfloat16)
    shares = weights(model)
    for name in args.card:
        card, found = CARDS[name], []
        titles = "limit", "launches", *TIMES
        print(f"{name + ', F5 base in bfloat16, us':<52}" + "".join(f"{t:>9}" for t in titles))
        with torch.no_grad():
            for case in simulated(model, card):
                found.append(case)
                print(*lines(case, args.rows), sep="\n", flush=True)
        results = {"card": name, **card._asdict(), "launch": LAUNCH, "versions": versions}
        results |= {"commit": facts.commit(), "weights": shares}
        if args.out is not None:
            facts.write(args.out / f"{name}.json", results | {"cases": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
