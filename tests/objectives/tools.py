"""Batches, students, and a wrapper around one."""

from __future__ import annotations

import torch
from torch import nn

from imf_kernels import Batch
from imf_kernels.models import CausalUNet, CausalUNetConfig
from tests.models.tools import conditions, small_model


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(rows=6, frames=5, channels=2, dtype=torch.float64, lengths=None, **more):
    x1 = torch.randn(rows, frames, channels, generator=seeded(99), dtype=dtype)
    lengths = torch.full((rows,), frames) if lengths is None else torch.tensor(lengths)
    return Batch(x1, lengths, **more)


class Scale(nn.Module):
    """A student of one weight per input that knows how it was called."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, -0.2], dtype=dtype))
        self.inputs = []

    def prepare(self, lengths, **conditions):
        return {"lengths": lengths, **conditions}

    def forward(self, x, t, r, cond):
        self.inputs.append((x, t, r, cond))
        return self.weight[0] * x + self.weight[1]


class Small(nn.Module):
    """A student of one channel that can learn one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = (nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
        self.net = nn.Sequential(*layers)

    def prepare(self, lengths):
        return {"lengths": lengths}

    def forward(self, x, t, r, cond):
        times = torch.stack([t, r], dim=-1)[:, None].expand(*x.shape[:2], 2)
        return self.net(torch.cat([x, times], dim=-1))


class Wrapped(nn.Module):
    """As DistributedDataParallel: `prepare` belongs to the module inside."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, *args):
        self.calls += 1
        return self.module(*args)


def real_student(name, **switches):
    """A small student that does depend on r."""
    torch.manual_seed(0)
    if name == "unet":
        sizes = {"dim": 32, "mid_blocks": 1, "depth": 1, "heads": 2, "head_dim": 16}
        model = CausalUNet(CausalUNetConfig(time_dim=32, channels=12, **sizes))
    else:
        model = small_model(name, **switches)
    student = model.student()
    with torch.no_grad():
        student.time_embed_mixer.weight.add_(
            0.05 * torch.randn(student.time_embed_mixer.weight.shape)
        )
    return student  # fmt: skip


def real_batch(student, lengths=(7, 4), **more):
    given = conditions(student, list(lengths)) | more
    x1 = torch.randn(len(lengths), max(lengths), 12, generator=seeded())
    return Batch(x1, given.pop("lengths"), given)
