"""Tiny runs."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from imf_kernels import Batch, IntMeanFlow, Teacher
from imf_kernels.distill import Settings, Trainer
from tests.flows import Linear
from tests.objectives.tools import Small, real_batch, seeded

os.environ["ACCELERATE_USE_CPU"] = "true"  # also where there is a GPU


class Affine(nn.Module):
    """`u = slope x + offset`: of the linear flow over [0, 1] the exact form."""

    def __init__(self, slope=0.0, offset=0.0):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([float(slope)]))
        self.offset = nn.Parameter(torch.tensor([float(offset)]))

    def prepare(self, lengths):
        return {"lengths": lengths}

    def forward(self, x, t, r, cond):
        return self.slope * x + self.offset


def pull(student, batch):
    """A constant gradient of 1: Adam then moves each weight by the learning rate."""
    loss = sum(1.0 * p.sum() for p in student.parameters() if p.requires_grad)
    return loss, {"loss": loss.detach()}


def batches(start=0, rank=0, ranks=1, rows=4):
    """Endless: the p-th batch of a rank is a function of p."""
    for position in itertools.count(start):
        x1 = torch.randn(rows, 5, 1, generator=seeded(position * ranks + rank))
        yield Batch(x1, torch.full((rows,), 5))


def real_batches(student, rank=0, ranks=1):
    """Of a tiny DiT, likewise."""

    def batches(start):
        for position in itertools.count(start):
            batch, index = real_batch(student), position * ranks + rank
            yield Batch(
                torch.randn(batch.x1.shape, generator=seeded(index)),
                batch.lengths,
                batch.conditions,
            )

    return batches


def objective(**options):
    return IntMeanFlow(Teacher(Linear(-1.2, 0.7)), nfe=2, **options)


def trainer(folder: Path, updates=8, student=None, made=None, source=batches, callbacks=(), **more):
    settings = Settings(**({"updates": updates, "lr": 0.01, "save_every": 4} | more))
    student = Small() if student is None else student
    made = objective() if made is None else made
    return Trainer(student, made, source, folder, settings, callbacks=callbacks)


def weights(student) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in student.state_dict().items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(one, other, rtol=1e-5):
    """Relative, over all weights: a weight of Adam's whose gradient is rounding is nobody's."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        error = float((value - other[name]).norm() / other[name].norm().clamp(min=1e-3))
        assert error < rtol, f"{name}: {error}"


def saved(folder: Path) -> list[str]:
    """Everything in the folder of checkpoints, hidden or not."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def read(folder: Path, update: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step_{update:08d}" / f"{name}.safetensors")


class Records:
    """What callbacks are told."""

    def __init__(self):
        self.told, self.records = [], []

    def started(self, trainer):
        self.told.append(("started", trainer.update))

    def begun(self, trainer, record):
        self.told.append(("begun", record["update"]))

    def updated(self, trainer, record):
        assert record["update"] == trainer.update
        self.records.append(record)

    def saved(self, trainer, path):
        self.told.append(("saved", path.name))

    def ended(self, trainer):
        self.told.append(("ended", trainer.update))
