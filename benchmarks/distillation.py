"""What distillation pays for a target: teacher steps, rollouts used again, and a JVP instead.

    python -m benchmarks.distillation --out benchmarks/results/<device>/distillation.json

    teacher   an update of IntMeanFlow at every teacher NFE; 0 is the student's part alone, which
              costs what flow matching does
    targets   one rollout from noise, and the student's part with several of its intervals, each
              backward before the next
    jvp       IntMeanFlow and MeanFlow at equal batch in float32, which derivatives want; ours takes
              the derivative apart, without gradient, the published one records it

On a CUDA device, seconds and the most bytes held, with a fused AdamW; elsewhere the FLOPs and bytes
of rollout, forward and backward pass, counted on tensors without data: bytes are what lies in
storages between operations. Both beyond weights and optimizer, gradients included.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import count, facts, operations
from benchmarks.timing import Run, interleaved
from benchmarks.updates import GUIDANCE, Trained, draw, peak_bytes, step, trained
from benchmarks.workload import build
from imf_kernels import Batch, IntMeanFlow, MeanFlow, Teacher, backend
from imf_kernels.objectives import LogitNormal, RolloutCache, total_derivative
from imf_kernels.objectives.students import Prepared

PAPER = {0: 0.93, 2: 1.12, 4: 1.74, 8: 2.91, 16: 5.17}
"""Seconds of an update on an A100 by teacher NFE (arXiv 2510.07979)."""

REUSE = (1, 4, 16)

Loss = Callable[[], Tensor]


def teacher_part(it: Trained, drawn: Any, args: argparse.Namespace) -> dict[str, Loss]:
    return {f"NFE {nfe}": it.loss(nfe, *drawn) for nfe in args.nfe}


def targets_part(it: Trained, drawn: Any, args: argparse.Namespace) -> dict[str, Loss]:
    batch, _ = drawn
    nfe = max(args.nfe)

    def objective(targets: int, cache: RolloutCache | None = None) -> IntMeanFlow:
        teacher = Teacher(it.teacher, GUIDANCE)
        return IntMeanFlow(teacher, nfe=nfe, source="noise", targets=targets, cache=cache)

    def last_loss(objective: IntMeanFlow) -> Tensor:
        *others, last = objective.by_target(it.called, batch)
        for other in others:
            other()[0].backward()
        return last()[0]

    kept = RolloutCache(1)
    kept.add(objective(1).rollout(batch))
    runs: dict[str, Loss] = {"rollout": lambda: objective(1).rollout(batch).states}
    for targets in args.targets:
        runs[f"{targets} targets"] = functools.partial(last_loss, objective(targets, kept))
    return runs


def jvp_part(it: Trained, drawn: Any, args: argparse.Namespace) -> dict[str, Loss]:
    batch, _ = drawn
    teacher = Teacher(it.teacher, GUIDANCE)
    runs = {f"IntMeanFlow, NFE {nfe}": it.loss(nfe, *drawn) for nfe in args.nfe if nfe}
    for derivative in ("difference", "jvp"):
        objective = MeanFlow(teacher, derivative=derivative)
        runs[f"MeanFlow, {derivative}"] = lambda o=objective: o(it.called, batch)[0]
    runs["MeanFlow, jvp as published"] = lambda: published(it, batch)
    return runs


def published(it: Trained, batch: Batch) -> Tensor:
    """MeanFlow's value and derivative from one evaluation, all of which autograd records."""
    teacher = Teacher(it.teacher, GUIDANCE)
    t, r = LogitNormal().draw(len(batch.x1), device=batch.x1.device)
    z = torch.lerp(torch.randn_like(batch.x1), batch.x1, t[:, None, None])
    v = teacher.velocity(z, t, teacher.prepare(lengths=batch.lengths, **batch.conditions))
    with backend("reference"), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        duals = forward_ad.make_dual(z, v), forward_ad.make_dual(t, torch.ones_like(t))
        u, slope = forward_ad.unpack_dual(Prepared(it.called, batch)(*duals, r))
        target = v + (r - t)[:, None, None] * slope.detach()
        return (u - target).square().mean()


PARTS = {"teacher": teacher_part, "targets": targets_part, "jvp": jvp_part}


def measured(it: Trained, runs: Mapping[str, Loss], device: torch.device, rounds: int) -> Any:
    """By name, seconds and bytes; None for what does not fit."""
    steps: dict[str, Run] = {}
    held: dict[str, int | None] = {}
    for name, loss in runs.items():
        update = loss if name == "rollout" else step(it.student, loss)
        try:
            held[name] = peak_bytes(update, device)
            steps[name] = update
        except torch.OutOfMemoryError:
            held[name] = None
        facts.release()
    times = interleaved(steps, device, rounds, warm_ups=1)
    seconds = {name: taken.median / 1e3 for name, taken in times.items()}
    return {name: {"seconds": seconds.get(name), "bytes": held[name]} for name in runs}


def counted(it: Trained, runs: Mapping[str, Loss]) -> dict[str, dict[str, float]]:
    """By name, FLOPs and bytes."""

    def update(run: Loss) -> None:
        result = run()
        if result.requires_grad:
            result.backward()

    found = {}
    with mock.patch.object(total_derivative, "verify"):  # reads values, once
        for name, run in runs.items():
            one = operations.count(functools.partial(update, run))
            found[name] = {"flops": one.flops, "bytes": one.held}
            it.student.zero_grad()
    return found


def measure(args: argparse.Namespace, found: facts.Report, name: str, rows: int) -> None:
    """All runs of a part, on a batch of full rows."""
    device = torch.device(args.device)
    dtype = torch.float32 if name == "jvp" else getattr(torch, args.dtype)
    on_cuda = device.type == "cuda"
    with contextlib.nullcontext() if on_cuda else count.without_data():
        model, _ = build(args.size, device if on_cuda else torch.device("meta"), dtype)
        it = trained(model, checkpointing=False)
        it.student.fuse_weights()
        runs = PARTS[name](it, draw(model, [args.frames] * rows), args)
        results = measured(it, runs, device, args.rounds) if on_cuda else counted(it, runs)
    for label, numbers in results.items():
        row = {"part": name, "run": label, "rows": rows, "frames": args.frames, **numbers}
        found.add(row, line(row))


def cost(row: Mapping[str, Any]) -> float | None:
    """Seconds, or TFLOP where those were counted; None for what does not fit."""
    return row["seconds"] if "seconds" in row else row["flops"] / 1e12


def line(row: Mapping[str, Any]) -> str:
    cells = " ".join(f"{cell:>12}" for cell in _cells(row))
    return f"{row['part']:<9}{row['rows']:>3} x {row['frames']:<6}{row['run']:<28}{cells}"


def tables(results: Mapping[str, Any]) -> str:
    """Markdown, of a whole run's results: three tables."""
    rows = results["rows"]
    unit = "s" if "seconds" in rows[0] else "TFLOP"
    makers = {"teacher": _teacher_table, "targets": _targets_table, "jvp": _jvp_table}
    return "\n\n".join(
        "\n".join(make([row for row in rows if row["part"] == part], unit))
        for part, make in makers.items()
    )


def _teacher_table(rows: Sequence[Mapping[str, Any]], unit: str) -> Iterator[str]:
    yield f"| teacher NFE | {unit} | GiB | of NFE 0 | the paper: s | of NFE 0 |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        nfe = int(row["run"].removeprefix("NFE "))
        times, paper = _divided(cost(row), cost(rows[0])), PAPER[nfe] / PAPER[0]
        cells = (*_cells(row), _number(times, 2), f"{PAPER[nfe]:.2f}", f"{paper:.2f}")
        yield f"| {nfe} | {' | '.join(cells)} |"


def _targets_table(rows: Sequence[Mapping[str, Any]], unit: str) -> Iterator[str]:
    titles = " | ".join(f"rollout used {times}x" for times in REUSE)
    yield f"| targets of an update, {unit} of each | {titles} | GiB |"
    yield "|---|" + "---|" * (len(REUSE) + 1)
    rollout, *losses = rows
    for row in losses:
        targets, paid, own = int(row["run"].split()[0]), cost(rollout), cost(row)
        each = [None if own is None else (paid / times + own) / targets for times in REUSE]
        cells = " | ".join(_number(one, 3 if unit == "s" else 1) for one in each)
        yield f"| {targets} | {cells} | {_cells(row)[1]} |"


def _jvp_table(rows: Sequence[Mapping[str, Any]], unit: str) -> Iterator[str]:
    batches = list(dict.fromkeys((row["rows"], row["frames"]) for row in rows))
    titles = " | ".join(f"{r} x {n} frames: {unit} | GiB" for r, n in batches)
    yield f"| float32 | {titles} |"
    yield "|---|" + "---|---|" * len(batches)
    for run in dict.fromkeys(row["run"] for row in rows):
        cells = [cell for row in rows if row["run"] == run for cell in _cells(row)]
        yield f"| {run} | {' | '.join(cells)} |"


def _cells(row: Mapping[str, Any]) -> tuple[str, str]:
    """Cost and GiB."""
    held = None if row["bytes"] is None else row["bytes"] / 2**30
    return _number(cost(row), 3 if "seconds" in row else 1), _number(held, 1)


def _number(value: float | None, digits: int) -> str:
    return "does not fit" if value is None else f"{value:.{digits}f}"


def _divided(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def parser() -> argparse.ArgumentParser:
    found = facts.parser(__doc__, rounds=5)
    found.add_argument("--size", default="f5_base", choices=("f5_base", "tiny"))
    found.add_argument("--rows", type=int, default=40, help="of a batch, all of them full")
    found.add_argument("--frames", type=int, default=960, help="of a row")
    found.add_argument("--nfe", nargs="+", type=int, default=list(PAPER), choices=PAPER)
    found.add_argument("--targets", nargs="+", type=int, default=[1, 2, 4, 8])
    found.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    return found


def main() -> int:
    args = parser().parse_args()
    found = facts.Report("distillation", args)
    for name in args.parts:
        for rows in (1, args.rows) if name == "jvp" else (args.rows,):
            with found.attempt(f"{name}, {rows} rows"):
                measure(args, found, name, rows)
            facts.release()
    if not found.results["failures"] and args.parts == list(PARTS):
        print("", tables(found.results), sep="\n")
    return found.finish()


if __name__ == "__main__":
    sys.exit(main())
