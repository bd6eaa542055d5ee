"""What every training loop does to a student: AdamW, its learning rate, the mode of its modules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from imf_kernels import checks

DECAYS = ("cosine", "linear", "constant")


def trainable(student: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name.

    Raises:
        ValueError: none.
    """
    found = {name: p for name, p in student.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError("student: expected trainable parameters, got none")
    return found


def adamw(
    student: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.98)
) -> torch.optim.AdamW:
    """AdamW of the trainable parameters, one kernel for all of them."""
    parameters = list(trainable(student).values())
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=betas, fused=True)


def schedule(
    update: int, updates: int, warmup: int, decay: str = "cosine", min_lr: float = 0.0
) -> float:
    """Share of the peak learning rate: linear warm-up, then `decay` to `min_lr`.

    Args:
        update: From 0.
        updates: Of the whole run, at whose end `min_lr` is reached.
        warmup: Updates of which the last has the peak.
        decay: "cosine", "linear" or "constant".
        min_lr: Share of the peak.
    """
    checks.choice("decay", decay, DECAYS)
    if update < warmup:
        return (update + 1) / warmup
    if decay == "constant":
        return 1.0
    progress = (update - warmup) / max(updates - warmup, 1)
    share = 1 - progress if decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return min_lr + (1 - min_lr) * share


def fuse_weights(student: nn.Module) -> None:
    """Lay weights that are read as one side by side, where the student knows how."""
    fuse: Any = getattr(student, "fuse_weights", None)
    if fuse is not None:
        fuse()


def train_mode(student: nn.Module) -> None:
    """Training mode, but frozen parts (an encoder) stay in eval."""
    student.train()
    for module in student.modules():
        own = list(module.parameters())
        if own and not any(p.requires_grad for p in own):
            module.eval()
