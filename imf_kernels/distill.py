"""A plain distillation loop: AdamW, warm-up and cosine, clipping, optional EMA.

Objectives need no loop of ours; this one is here for small runs and as a template.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from imf_kernels import checks
from imf_kernels.objectives.batch import Batch

Student = TypeVar("Student", bound=nn.Module)
Objective = Callable[[Any, Batch], tuple[Tensor, dict[str, Tensor]]]


def distill(
    student: Student,
    objective: Objective,
    batches: Iterable[Batch],
    updates: int,
    *,
    lr: float = 1e-4,
    warmup: int = 0,
    clip: float = 1.0,
    weight_decay: float = 0.01,
    ema_decay: float | None = None,
    callback: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> Student:
    """Train the student's trainable parameters on an objective, and return it in eval mode.

    Args:
        student: Trained in place.
        objective: `loss, info = objective(student, batch)`.
        batches: At least `updates` batches.
        updates: Optimizer steps.
        lr: Peak learning rate, reached after `warmup` updates, then on a cosine to 0.
        clip: Gradient norm limit.
        weight_decay: AdamW's.
        ema_decay: Return the exponential moving average of the weights, with this decay.
        callback: Called as `callback(update, info)` after every update.

    Raises:
        ValueError: bad arguments, or `batches` that end too early.
        FloatingPointError: a gradient that is not finite; the weights are those before the update.
    """
    checks.positive_int("updates", updates)
    if not 0 <= warmup <= updates:
        raise ValueError(f"warmup: expected an integer in [0, {updates}], got {warmup}")
    if not clip > 0:
        raise ValueError(f"clip: expected a number > 0, got {clip}")
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay: expected a number in [0, 1), got {ema_decay}")
    parameters = [p for p in student.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("student: expected trainable parameters, got none")
    fuse_weights: Any = getattr(student, "fuse_weights", None)
    if fuse_weights is not None:
        fuse_weights()
    optimizer = torch.optim.AdamW(
        parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98), fused=True
    )
    ema = None
    if ema_decay is not None:
        ema = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
    _train_mode(student)
    source = iter(batches)
    for update in range(updates):
        batch = next(source, None)
        if batch is None:
            raise ValueError(f"batches: expected {updates} batches, got {update}")
        optimizer.param_groups[0]["lr"] = lr * schedule(update, updates, warmup)
        loss, info = objective(student, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, clip)
        if not math.isfinite(float(norm)):
            raise FloatingPointError(
                f"update {update}: expected a finite gradient, got norm {float(norm)} at loss "
                f"{float(loss.detach())}"
            )
        optimizer.step()
        if ema is not None:
            ema.update_parameters(student)
        if callback is not None:
            callback(update, info)
    if ema is not None:
        student.load_state_dict(ema.module.state_dict())
    return student.eval()


def _train_mode(student: nn.Module) -> None:
    """Training mode, but frozen parts (an encoder) stay in eval."""
    student.train()
    for module in student.modules():
        own = list(module.parameters())
        if own and not any(p.requires_grad for p in own):
            module.eval()


def schedule(update: int, updates: int, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to 0."""
    if update < warmup:
        return (update + 1) / warmup
    progress = (update - warmup) / max(updates - warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * progress))
