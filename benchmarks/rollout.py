"""A guided teacher rollout of a ragged batch, against plain PyTorch at equal dtype and padding.

    python -m benchmarks.rollout --out benchmarks/results/<device>/rollout.json

    eager, compile  plain PyTorch on the same weights, and that under torch.compile; rows padded
    ours            `Teacher.integrate` of the fused model; rows padded
    packed          the same, rows behind one another
    fp8             the same, packed and in FP8 where that is faster (`imf_kernels.fp8`)

All from `integrate`'s call to the displacement, conditions prepared before. `floor` is that of the
valid frames alone. The shortest rows are compared with their float32 rollouts first; a contender
that is more than twice as far from them as plain PyTorch in the same dtype is a failure, and so is
FP8 that is more than 5 % off.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import facts
from benchmarks.plain import plain, plainly
from benchmarks.timing import Ceilings, interleaved
from benchmarks.workload import build, error, floor, ragged_lengths, request, wrong
from imf_kernels import Teacher, fp8
from imf_kernels.models import DiT

GUIDANCE = 3.0
CHECKED = 2
"""Rows whose displacements are compared with float32's."""


class Batch(NamedTuple):
    """Rows with intervals of their own, ready to be integrated."""

    z: Tensor
    t: Tensor
    r: Tensor
    given: dict[str, Tensor]

    @classmethod
    def draw(cls, model: DiT, lengths: list[int]) -> Batch:
        prompt = min(lengths) // 4
        z, given = request(model, len(lengths), max(lengths), prompt, lengths)
        t, length = (torch.rand(2, len(lengths), device=z.device) / 2).unbind()
        return cls(z, t, t + length, given)

    def row(self, i: int) -> Batch:
        """A row alone, without padding."""
        at, frames = slice(i, i + 1), int(self.given["lengths"][i])
        given = {name: value[at] for name, value in self.given.items()}
        given["prompt"] = given["prompt"][:, :frames]
        return Batch(self.z[at, :frames].contiguous(), self.t[at], self.r[at], given)

    def integrate(self, model: Any, nfe: int, packed: bool = False) -> Callable[[], Tensor]:
        teacher = Teacher(model, GUIDANCE)
        cond = teacher.prepare(**self.given, packed=packed)
        return lambda: teacher.integrate(self.z, self.t, self.r, nfe, cond).displacement


def contenders(model: DiT, batch: Batch, nfe: int) -> dict[str, Callable[[], Callable[[], Any]]]:
    """How to make each. A further form of the model is an entry here, and a column."""
    twin = functools.cache(lambda: plain(model))
    frames = int(batch.given["lengths"].sum())
    return {
        "eager": lambda: plainly(batch.integrate(twin(), nfe)),
        "compile": lambda: plainly(batch.integrate(torch.compile(twin(), dynamic=False), nfe)),
        "ours": lambda: batch.integrate(model, nfe),
        "packed": lambda: batch.integrate(model, nfe, packed=True),
        "fp8": lambda: batch.integrate(fp8.quantize(model, [2 * frames]), nfe, packed=True),
    }


COLUMNS = ("eager", "compile", "ours", "packed", "fp8")
FP8_ERROR = 0.05


def measure(args: argparse.Namespace, found: facts.Report, nfe: int, ceilings: Ceilings) -> None:
    device = torch.device(args.device)
    model, rate = build(args.size, device, getattr(torch, args.dtype))
    lengths = ragged_lengths(args.frames, *(round(s * rate) for s in args.seconds))
    batch = Batch.draw(model, lengths)
    checked = sorted(range(len(lengths)), key=lambda i: lengths[i])[:CHECKED]
    exact, rough = plain(model).float(), plain(model)
    truths, allowed = [], []
    for i in checked:
        alone = batch.row(i)
        truths.append(plainly(alone.integrate(exact, nfe))())
        allowed.append(error(plainly(alone.integrate(rough, nfe))(), truths[-1]))
    del exact, rough

    errors, runs = {}, {}
    made = contenders(model, batch, nfe)
    for name in args.columns:
        with found.attempt(f"NFE {nfe}, {name}"):
            run = made[name]()
            result = run()
            errors[name] = [
                error(result[i, : lengths[i]][None], truth)
                for i, truth in zip(checked, truths, strict=True)
            ]
            bounds = [FP8_ERROR / 2] * CHECKED if name == "fp8" else allowed
            if wrong(errors[name], bounds):
                raise ArithmeticError(f"errors {errors[name]}, those of plain PyTorch {allowed}")
            runs[name] = run
    times = interleaved(runs, device, args.rounds, warm_ups=1)
    row = {
        "nfe": nfe,
        "rows": len(lengths),
        "frames": sum(lengths),
        "padded_frames": len(lengths) * max(lengths),
        "lengths": lengths,
        "floor_ms": floor(model, 2 * lengths, nfe, ceilings),
        "ms": {name: t._asdict() for name, t in times.items()},
        "errors": {"plain": allowed, **errors},
    }
    found.add(row, line(row))


def line(row: dict[str, Any]) -> str:
    cells = []
    for name in COLUMNS:
        taken = row["ms"].get(name, {}).get("median")
        eager = row["ms"].get("eager", {}).get("median", float("nan"))
        cells.append(f"{taken:10.1f} {eager / taken:5.2f}x" if taken else "-")
    return (
        f"{row['nfe']:3d} {row['rows']:4d} {row['frames']:7d} {row['padded_frames']:7d} "
        f"{row['floor_ms']:8.1f}" + "".join(f"{cell:>19}" for cell in cells)
    )


def parser() -> argparse.ArgumentParser:
    found = facts.parser(__doc__, rounds=5)
    found.add_argument("--size", default="f5_base", choices=("f5_base", "tiny"))
    found.add_argument("--frames", type=int, default=38400, help="of all rows together")
    found.add_argument("--seconds", nargs=2, type=float, default=[3, 30], help="of a row")
    found.add_argument("--nfe", nargs="+", type=int, default=[8])
    found.add_argument("--columns", nargs="+", default=COLUMNS, choices=COLUMNS)
    return found


def main() -> int:
    args = parser().parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    ceilings = Ceilings.measure(device, dtype)
    found = facts.Report("rollout", args, ceilings=ceilings._asdict())
    print("nfe rows  frames  padded    floor" + "".join(f"{name:>19}" for name in COLUMNS))
    print("(milliseconds, speed against eager)")
    with torch.no_grad():
        for nfe in args.nfe:
            with found.attempt(f"NFE {nfe}"):
                measure(args, found, nfe, ceilings)
            facts.release()
    return found.finish()


if __name__ == "__main__":
    sys.exit(main())
