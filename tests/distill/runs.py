"""What callbacks see of a trainer, without one."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import nn

from imf_kernels import Batch


class Accelerator:
    """One rank of some: `others` are what the others put into a sum."""

    def __init__(self, rank=0, ranks=1, others=0.0):
        self.process_index, self.num_processes, self.others = rank, ranks, others
        self.is_main_process, self.device = rank == 0, torch.device("cpu")

    def reduce(self, tensor, reduction):
        assert reduction == "sum"
        return tensor + self.others


class Line(nn.Module):
    """`u = slope + offset x`, with a mean of its weights beside them."""

    channels = 4

    def __init__(self, slope=1.0, averaged=None):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))
        self.averaged, self.asked = averaged, []

    def prepare(self, lengths, guided=False, **told):
        self.asked.append(told)
        return {"lengths": lengths.repeat(1 + guided)}

    def forward(self, x, t, r, cond):
        assert not self.training
        v = self.slope + 0.5 * x
        return torch.cat([v, 0.5 * v]) if len(cond["lengths"]) > len(x) else v


def fake_trainer(folder, student=None, update=0, updates=10, log_every=2, **ranks):
    @contextmanager
    def averaged():
        before = student.slope.data.clone()
        if student.averaged is not None:
            student.slope.data.fill_(student.averaged)
        student.eval()
        yield
        student.slope.data.copy_(before)
        student.train()

    return SimpleNamespace(
        accelerator=Accelerator(**ranks),
        student=student,
        folder=folder,
        settings=SimpleNamespace(updates=updates, log_every=log_every),
        update=update,
        averaged=averaged,
    )


def record(update, **more):
    told = {"loss": 1.5, "norm": 2.0, "lr": 1e-4, "seconds": 0.5, "frames": 1000.0, "skipped": 0.0}
    return {"update": update, **told, **more}


def batches(count=3, rows=2, frames=6, channels=4):
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        x1 = torch.randn(rows, frames - i, channels, generator=generator)
        lengths = torch.tensor([frames - i] * (rows - 1) + [2])
        mask = torch.zeros(x1.shape[:2], dtype=torch.bool)
        mask[:, 1:4] = True
        made.append(Batch(x1, lengths, {}, mask))
    return made
