"""One IntMeanFlow training step: its time and memory, against plain PyTorch at equal dtype.

    python -m benchmarks.training --out benchmarks/results/<device>/training.json

    eager, compile  teacher and student in plain PyTorch, and both under torch.compile
    ours            the fused ones

A step is the teacher's guided rollout, the student's forward and backward and a fused AdamW, on one
ragged padded batch, weights in the given dtype. NFE 0 is a step on a rollout that is already there:
the student's part alone, which costs what a step of plain flow matching does. `bytes` is the most
that a step holds beyond weights and optimizer. Gradients of that part are compared with float32's
first; a contender that is more than twice as far from them as plain PyTorch is a failure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import facts
from benchmarks.plain import plain, plainly
from benchmarks.timing import Run, interleaved, synchronize
from benchmarks.workload import build, error, ragged_lengths, request, wrong
from imf_kernels import Batch, IntMeanFlow, Teacher
from imf_kernels.models import DiT
from imf_kernels.objectives.rollouts import TeacherRollout

COLUMNS = ("eager", "compile", "ours")
GUIDANCE = 3.0


def draw(model: DiT, lengths: list[int]) -> tuple[Batch, TeacherRollout]:
    """A batch, and a rollout of it that took no teacher."""
    rows, frames = len(lengths), max(lengths)
    x1, given = request(model, rows, frames, min(lengths) // 4, lengths)
    batch = Batch(x1, given.pop("lengths"), given)
    times = torch.tensor([[0.25], [0.75]], device=x1.device).repeat(1, rows)
    noise, displacement = torch.randn(2, 1, *x1.shape, device=x1.device)
    return batch, TeacherRollout(batch, times, times - 0.25, noise, displacement, None)


class Trained(NamedTuple):
    """A teacher, its student in the same form, and what is called in the student's place."""

    teacher: Any
    student: DiT
    called: Any

    def loss(self, nfe: int, batch: Batch, rollout: TeacherRollout) -> Callable[[], Tensor]:
        objective = IntMeanFlow(Teacher(self.teacher, GUIDANCE), nfe=max(nfe, 1))
        if nfe == 0:
            return lambda: objective.loss(self.called, rollout)[0]
        return lambda: objective(self.called, batch)[0]

    def gradient(self, batch: Batch, rollout: TeacherRollout) -> Tensor:
        """Of all weights together, float32."""
        self.loss(0, batch, rollout)().backward()
        grads = [p.grad.flatten().float() for p in self.student.parameters() if p.grad is not None]
        self.student.zero_grad()
        return torch.cat(grads)


def trained(column: str, model: DiT, checkpointing: bool) -> Trained:
    with model.proj_out.weight.device:
        student = model.student()
    if column != "ours":
        model, student = plain(model), plain(student)
    student.checkpoint_activations = checkpointing
    if column == "compile":
        compiled = torch.compile(student, dynamic=False)
        return Trained(torch.compile(model, dynamic=False), student, compiled)
    return Trained(model, student, student)


def step(student: DiT, loss: Callable[[], Tensor]) -> Run:
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=True)

    def run() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """The most that a call holds beyond what is there before it; None on the CPU."""
    if device.type != "cuda":
        return None
    run()
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def right(
    args: argparse.Namespace,
    found: facts.Report,
    model: DiT,
    drawn: tuple[Batch, TeacherRollout],
    checkpointing: bool,
) -> tuple[dict[str, Trained], dict[str, float]]:
    """The contenders whose gradients are right, and how far all are from float32's."""
    exact = trained("eager", model, checkpointing=True)
    exact.student.float()
    truth = plainly(exact.gradient)(*drawn)
    del exact
    allowed = error(plainly(trained("eager", model, checkpointing).gradient)(*drawn), truth)
    contenders, errors = {}, {"plain": allowed}
    for column in args.columns:
        with found.attempt(f"{column}, checkpointing {checkpointing}"):
            it = trained(column, model, checkpointing)
            gradient = it.gradient if column == "ours" else plainly(it.gradient)
            errors[column] = error(gradient(*drawn), truth)
            if wrong([errors[column]], [allowed]):
                raise ArithmeticError(f"error {errors[column]}, that of plain PyTorch {allowed}")
            contenders[column] = it
    return contenders, errors


def measure(
    args: argparse.Namespace, found: facts.Report, model: DiT, rate: float, checkpointing: bool
) -> None:
    device = torch.device(args.device)
    lengths = ragged_lengths(args.frames, *(round(s * rate) for s in args.seconds))
    drawn = draw(model, lengths)
    contenders, errors = right(args, found, model, drawn, checkpointing)
    plain_step: dict[str, float] = {}
    for nfe in sorted(args.nfe):
        runs, held = {}, {}
        for column, it in contenders.items():
            with found.attempt(f"NFE {nfe}, {column}, checkpointing {checkpointing}"):
                run = step(it.student, it.loss(nfe, *drawn))
                run = run if column == "ours" else plainly(run)
                held[column] = peak_bytes(run, device)
                runs[column] = run
        times = interleaved(runs, device, args.rounds, warm_ups=1)
        if nfe == 0:
            plain_step = {column: t.median for column, t in times.items()}
        row = {
            "nfe": nfe,
            "checkpointing": checkpointing,
            "rows": len(lengths),
            "frames": sum(lengths),
            "padded_frames": len(lengths) * max(lengths),
            "ms": {column: t._asdict() for column, t in times.items()},
            "bytes": held,
            "errors": errors,
            "plain_steps": {c: times[c].median / plain_step[c] for c in times if c in plain_step},
        }
        found.add(row, line(row))


HEADER = "nfe checkpointing" + "".join(f"{name:>30}" for name in COLUMNS)


def line(row: dict[str, Any]) -> str:
    cells = []
    for column in COLUMNS:
        if column not in row["ms"]:
            cells.append("-")
            continue
        taken, held = row["ms"][column]["median"], row["bytes"][column]
        speed = row["ms"].get("eager", {}).get("median", float("nan")) / taken
        size = "" if held is None else f"{held / 2**30:7.2f} GiB"
        cells.append(f"{taken:9.1f} {speed:5.2f}x{size}")
    return f"{row['nfe']:3d} {row['checkpointing']!s:>13}" + "".join(f"{c:>30}" for c in cells)


def parser() -> argparse.ArgumentParser:
    found = facts.parser(__doc__, rounds=7)
    found.add_argument("--size", default="f5_base", choices=("f5_base", "tiny"))
    found.add_argument("--frames", type=int, default=9600, help="of all rows together")
    found.add_argument("--seconds", nargs=2, type=float, default=[3, 30], help="of a row")
    found.add_argument("--nfe", nargs="+", type=int, default=[0, 2, 4, 8, 16])
    found.add_argument("--checkpointing", nargs="+", default=["no", "yes"], choices=("no", "yes"))
    found.add_argument("--columns", nargs="+", default=COLUMNS, choices=COLUMNS)
    return found


def main() -> int:
    args = parser().parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    found = facts.Report("training", args)
    model, rate = build(args.size, device, dtype)
    print(f"{HEADER}\n(milliseconds of a step, speed against eager, memory)")
    for checkpointing in args.checkpointing:
        with found.attempt(f"checkpointing {checkpointing}"):
            measure(args, found, model, rate, checkpointing == "yes")
        facts.release()
    return found.finish()


if __name__ == "__main__":
    sys.exit(main())
