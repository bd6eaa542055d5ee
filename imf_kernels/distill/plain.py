"""A plain distillation loop: AdamW, warm-up and cosine, clipping, optional EMA.

Objectives need no loop of ours; this one is here for small runs and as a template.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor, nn

from imf_kernels import checks
from imf_kernels.distill.ema import Ema
from imf_kernels.distill.optimization import (
    adamw,
    fuse_weights,
    schedule,
    train_mode,
    trainable,
)
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
        student: Trained in place, all that requires gradients.
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
    parameters = list(trainable(student).values())
    fuse_weights(student)
    optimizer = adamw(student, lr, weight_decay)
    ema = None if ema_decay is None else Ema(parameters, ema_decay)
    train_mode(student)
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
            ema.update()
        if callback is not None:
            callback(update, info)
    if ema is not None:
        ema.assign()
    return student.eval()
