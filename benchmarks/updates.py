"""Training steps that are measured: a batch, a teacher and its student, and one update of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.plain import plain
from benchmarks.timing import Run, synchronize
from benchmarks.workload import request
from imf_kernels import Batch, IntMeanFlow, Teacher
from imf_kernels.models import DiT
from imf_kernels.objectives.rollouts import TeacherRollout

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

    def gradient(self, loss: Callable[[], Tensor]) -> Tensor:
        """Of all weights together, float32."""
        loss().backward()
        grads = [p.grad.flatten().float() for p in self.student.parameters() if p.grad is not None]
        self.student.zero_grad()
        return torch.cat(grads)


def trained(
    model: DiT, checkpointing: bool, *, fused: bool = True, compiled: bool = False
) -> Trained:
    """A teacher and its student, in plain PyTorch unless `fused`."""
    with model.proj_out.weight.device:
        student = model.student()
    if not fused:
        model, student = plain(model), plain(student)
    student.checkpoint_activations = checkpointing
    if not compiled:
        return Trained(model, student, student)
    teacher, called = (torch.compile(it, dynamic=False) for it in (model, student))
    return Trained(teacher, student, called)


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
