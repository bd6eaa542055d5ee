"""Squared error between a student's mean velocity and its target, per row, in one pass.

    target = displacement / (r - t)   where r > t      (IntMeanFlow, arXiv 2510.07979, Eq. 4-8)
    target = velocity                 where r = t      (the displacement over the length is 0/0)
    sum_b w_b sum_{n, c} mask_bn (u - target)^2 / (C sum_bn mask_bn)

The kernel returns a sum per row; weights and the mean over the batch's masked frames are arithmetic
on `(B,)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imf_kernels import checks, dispatch
from imf_kernels.ops._dtypes import wide, wide_dtype
from imf_kernels.ops._layout import contiguous
from imf_kernels.ops._triton import accumulator, cdiv, jit, launch, tl, wait_for_predecessor

BLOCK = 2048


def reference(
    prediction: Tensor,
    displacement: Tensor,
    interval: Tensor,
    velocity: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch, the specification: the masked sum of squared errors of each row, `(B,)`."""
    error = _error(prediction, displacement, interval, velocity, mask)
    return error.square().sum((1, 2))


def _error(
    prediction: Tensor,
    displacement: Tensor,
    interval: Tensor,
    velocity: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    length = interval[:, None, None]
    if velocity is None:
        target = displacement / length
    else:
        instant = length == 0
        target = torch.where(instant, velocity, displacement / length.masked_fill(instant, 1.0))
    error = wide(prediction) - target
    return error if mask is None else error.masked_fill(~mask[:, :, None], 0.0)


@jit
def _load_error(
    p_u,
    p_displacement,
    p_interval,
    p_velocity,
    p_mask,
    o,
    m,
    row,
    row_size,
    CHANNELS: tl.constexpr,
    HAS_VELOCITY: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ACC: tl.constexpr,
):
    """The masked error of a block, float32; a row reads its displacement or its velocity."""
    if HAS_MASK:
        frame = row * (row_size // CHANNELS) + o // CHANNELS
        m = m & (tl.load(p_mask + frame, mask=m, other=0) != 0)
    o_row = row * row_size + o
    length = tl.load(p_interval + row)
    if HAS_VELOCITY:
        if length == 0:
            b_target = tl.load(p_velocity + o_row, mask=m, other=0.0)
        else:
            b_target = tl.load(p_displacement + o_row, mask=m, other=0.0) / length
    else:
        b_target = tl.load(p_displacement + o_row, mask=m, other=0.0) / length
    b_u = tl.load(p_u + o_row, mask=m, other=0.0).to(ACC)
    return tl.where(m, b_u - b_target, 0.0)


@jit(do_not_specialize=["frames"])
def _forward_kernel(
    p_u,
    p_displacement,
    p_interval,
    p_velocity,
    p_mask,
    p_partial,
    frames,
    CHANNELS: tl.constexpr,
    HAS_VELOCITY: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_predecessor()
    row = tl.program_id(1).to(tl.int64)
    row_size = frames.to(tl.int64) * CHANNELS
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_error = _load_error(
        p_u,
        p_displacement,
        p_interval,
        p_velocity,
        p_mask,
        o,
        o < row_size,
        row,
        row_size,
        CHANNELS,
        HAS_VELOCITY,
        HAS_MASK,
        ACC,
    )
    tl.store(p_partial + row * tl.num_programs(0) + tl.program_id(0), tl.sum(b_error * b_error, 0))


@jit(do_not_specialize=["frames"])
def _backward_kernel(
    p_grad,
    p_u,
    p_displacement,
    p_interval,
    p_velocity,
    p_mask,
    p_grad_u,
    frames,
    CHANNELS: tl.constexpr,
    HAS_VELOCITY: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_predecessor()
    row = tl.program_id(1).to(tl.int64)
    row_size = frames.to(tl.int64) * CHANNELS
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < row_size
    b_error = _load_error(
        p_u,
        p_displacement,
        p_interval,
        p_velocity,
        p_mask,
        o,
        m,
        row,
        row_size,
        CHANNELS,
        HAS_VELOCITY,
        HAS_MASK,
        ACC,
    )
    b_grad_u = 2 * tl.load(p_grad + row) * b_error
    tl.store(p_grad_u + row * row_size + o, b_grad_u.to(p_grad_u.dtype.element_ty), mask=m)


def _options(prediction: Tensor, velocity: Tensor | None, mask: Tensor | None) -> dict[str, Any]:
    return {
        "CHANNELS": prediction.shape[2],
        "HAS_VELOCITY": velocity is not None,
        "HAS_MASK": mask is not None,
        "ACC": accumulator(prediction),
        "BLOCK": BLOCK,
        "num_warps": 8,
    }


def _grid(prediction: Tensor) -> tuple[int, int]:
    rows, frames, channels = prediction.shape
    return cdiv(frames * channels, BLOCK), rows


def _launch_forward(
    prediction: Tensor,
    displacement: Tensor,
    interval: Tensor,
    velocity: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    grid = _grid(prediction)
    partial = prediction.new_empty((prediction.shape[0], grid[0]), dtype=wide_dtype(prediction))
    launch(
        _forward_kernel,
        grid,
        prediction,
        displacement,
        interval,
        velocity,
        mask,
        partial,
        prediction.shape[1],
        **_options(prediction, velocity, mask),
    )
    return partial.sum(1)


def _launch_backward(
    grad: Tensor,
    prediction: Tensor,
    displacement: Tensor,
    interval: Tensor,
    velocity: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    grad_u = prediction.new_empty(prediction.shape)
    launch(
        _backward_kernel,
        _grid(prediction),
        grad,
        prediction,
        displacement,
        interval,
        velocity,
        mask,
        grad_u,
        prediction.shape[1],
        **_options(prediction, velocity, mask),
    )
    return grad_u


@torch.library.custom_op("imf_kernels::mean_velocity_loss", mutates_args=())
def _op(
    prediction: Tensor,
    displacement: Tensor,
    interval: Tensor,
    velocity: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    run = _launch_forward if dispatch.runs_triton(prediction) else reference
    return run(*contiguous(prediction, displacement, interval, velocity, mask))


@_op.register_fake
def _(prediction, displacement, interval, velocity, mask):
    return prediction.new_empty((prediction.shape[0],), dtype=wide_dtype(prediction))


@torch.library.custom_op("imf_kernels::mean_velocity_loss_backward", mutates_args=())
def _op_backward(
    grad: Tensor,
    prediction: Tensor,
    displacement: Tensor,
    interval: Tensor,
    velocity: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    args = contiguous(grad, prediction, displacement, interval, velocity, mask)
    if dispatch.runs_triton(prediction):
        return _launch_backward(*args)
    error = _error(*args[1:])
    return (2 * grad[:, None, None] * error).to(prediction.dtype)


@_op_backward.register_fake
def _(grad, prediction, displacement, interval, velocity, mask):
    return prediction.new_empty(prediction.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return _op_backward(grad, *ctx.saved_tensors), None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def mean_velocity_loss(
    prediction: Tensor,
    displacement: Tensor,
    t: Tensor,
    r: Tensor,
    *,
    velocity: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    interval: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of a student `u(z_t, t, r)` against the teacher's mean velocity over `[t, r]`.

    Args:
        prediction: u, `(B, N, C)`, floating.
        displacement: The teacher's displacement over `[t, r]`, float32 `(B, N, C)`
            (float64 where the prediction is).
        t, r: float32 `(B,)`, 0 <= t <= r <= 1; t < r unless `velocity` is given.
        velocity: Target of the rows with r = t, float32 `(B, N, C)`.
        mask: Frames that count, bool `(B, N)`; None counts all.
        weights: Per-row weights, float32 `(B,)`; None weighs all rows 1. They do not enter the
            denominator.
        interval: r - t, `(B,)`, where it is known with more digits than the difference of two
            rounded times; 0 where r = t.

    Returns:
        The scalar loss (a mean over all counted frames and channels, float32), and the unweighted
        mean squared error of each row, detached, `(B,)`. A row without counted frames adds 0.

    Gradients pass to `prediction` and `weights` alone: the target is a constant. Sums run in a
    fixed order: deterministic.

    Raises:
        ValueError, TypeError: naming the argument, the expected and the given value; values are
            read on CPU tensors only.
    """
    checks.shape("prediction", prediction, "B", "N", "C")
    checks.floating("prediction", prediction)
    rows, frames, channels = prediction.shape
    for name, target in (("displacement", displacement), ("velocity", velocity)):
        if target is not None:
            checks.shape(name, target, rows, frames, channels)
            checks.dtype(name, target, wide_dtype(prediction))
            checks.same_device(name, target, prediction.device)
    checks.interval(t, r, rows, strict=velocity is None and interval is None)
    if mask is not None:
        checks.shape("mask", mask, rows, frames)
        checks.dtype("mask", mask, torch.bool)
    if weights is not None:
        checks.shape("weights", weights, rows)
        checks.dtype("weights", weights, wide_dtype(prediction))
    if interval is not None:
        checks.shape("interval", interval, rows)
        checks.dtype("interval", interval, torch.float32, torch.float64)
        least = 0 if velocity is None else -1e-30
        if checks.readable(interval) and not bool((interval > least).all()):
            wanted = "> 0" if velocity is None else ">= 0"
            raise ValueError(f"interval: expected lengths {wanted}, got {interval.tolist()}")
    for name, value in (
        ("t", t),
        ("r", r),
        ("mask", mask),
        ("weights", weights),
        ("interval", interval),
    ):
        checks.same_device(name, value, prediction.device)

    kernel = dispatch.use_kernel(prediction, displacement, t, r, interval, velocity)
    run = _op if kernel else reference
    length = (r - t if interval is None else interval).to(wide_dtype(prediction))
    constant = None if velocity is None else velocity.detach()
    sums = run(prediction, displacement.detach(), length.detach(), constant, mask)
    counts = (
        torch.full_like(sums, frames * channels) if mask is None else mask.sum(1) * float(channels)
    )
    weighted = sums if weights is None else sums * weights
    loss = weighted.sum() / counts.sum().clamp(min=1)
    return loss, (sums.detach() / counts.clamp(min=1))
