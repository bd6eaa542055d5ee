"""Gated residual of an adaLN block: `y = x + gate * h`, forward and backward.

The gate is one row of modulation per batch row, usually a strided view (`modulation.chunk(6)`);
it is read in place. (DiT, arXiv 2212.09748, adaLN-Zero.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from imf_kernels import checks, dispatch
from imf_kernels.ops._dtypes import wide, wide_dtype
from imf_kernels.ops._rows import FRAMES_PER_PROGRAM, check_modulation, row_warps
from imf_kernels.ops._triton import accumulator, cdiv, jit, launch, next_power_of_2, tl


def reference(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """Plain PyTorch, the specification."""
    return (wide(x) + wide(gate)[:, None] * wide(h)).to(x.dtype)


@jit(do_not_specialize=["frames"])
def _forward_kernel(
    p_x,
    p_h,
    p_gate,
    p_y,
    frames,
    stride_gate,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    frame = tl.program_id(0).to(tl.int64)
    row = frame // frames
    o = tl.arange(0, BLOCK_D)
    m = o < D
    b_x = tl.load(p_x + frame * D + o, mask=m, other=0.0).to(ACC)
    b_h = tl.load(p_h + frame * D + o, mask=m, other=0.0).to(ACC)
    b_gate = tl.load(p_gate + row * stride_gate + o, mask=m, other=0.0).to(ACC)
    b_y = b_x + b_gate * b_h
    tl.store(p_y + frame * D + o, b_y.to(p_y.dtype.element_ty), mask=m)


@jit(do_not_specialize=["frames"])
def _backward_kernel(
    p_grad,
    p_h,
    p_gate,
    p_grad_h,
    p_grad_gate,
    frames,
    stride_gate,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    FRAMES: tl.constexpr,
):
    """Gradient of `h`, and one partial sum of the gate's gradient per program."""
    chunk = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    o = tl.arange(0, BLOCK_D)
    m = o < D
    b_gate = tl.load(p_gate + row * stride_gate + o, mask=m, other=0.0).to(ACC)
    b_sum = tl.zeros([BLOCK_D], ACC)
    for i in range(FRAMES):
        frame = chunk * FRAMES + i
        if frame < frames:
            o_frame = (row * frames + frame) * D + o
            b_grad = tl.load(p_grad + o_frame, mask=m, other=0.0).to(ACC)
            b_h = tl.load(p_h + o_frame, mask=m, other=0.0).to(ACC)
            tl.store(p_grad_h + o_frame, (b_grad * b_gate).to(p_grad_h.dtype.element_ty), mask=m)
            b_sum += b_grad * b_h
    o_partial = (row * tl.num_programs(0) + chunk) * D + o
    tl.store(p_grad_gate + o_partial, b_sum, mask=m)


def _launch_forward(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    rows, frames, dim = x.shape
    y = x.new_empty(x.shape)
    block = next_power_of_2(dim)
    launch(
        _forward_kernel,
        (rows * frames,),
        x,
        h,
        gate,
        y,
        frames,
        gate.stride(0),
        D=dim,
        BLOCK_D=block,
        ACC=accumulator(x),
        num_warps=row_warps(block),
    )
    return y


def _launch_backward(grad: Tensor, h: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    rows, frames, dim = h.shape
    chunks = cdiv(frames, FRAMES_PER_PROGRAM)
    grad_h = h.new_empty(h.shape)
    partials = h.new_empty((rows, chunks, dim), dtype=wide_dtype(h))
    block = next_power_of_2(dim)
    launch(
        _backward_kernel,
        (chunks, rows),
        grad,
        h,
        gate,
        grad_h,
        partials,
        frames,
        gate.stride(0),
        D=dim,
        BLOCK_D=block,
        ACC=accumulator(h),
        FRAMES=FRAMES_PER_PROGRAM,
        num_warps=row_warps(block),
    )
    return grad_h, partials.sum(1).to(gate.dtype)


@torch.library.custom_op("imf_kernels::gated_residual", mutates_args=())
def _op(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    x, h = x.contiguous(), h.contiguous()
    return _launch_forward(x, h, gate) if dispatch.runs_triton(x) else reference(x, h, gate)


@_op.register_fake
def _(x, h, gate):
    return x.new_empty(x.shape)


@torch.library.custom_op("imf_kernels::gated_residual_backward", mutates_args=())
def _op_backward(grad: Tensor, h: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    grad, h = grad.contiguous(), h.contiguous()
    if dispatch.runs_triton(h):
        return _launch_backward(grad, h, gate)
    dy = wide(grad)
    grad_h = (dy * wide(gate)[:, None]).to(h.dtype)
    return grad_h, (dy * wide(h)).sum(1).to(gate.dtype)


@_op_backward.register_fake
def _(grad, h, gate):
    return h.new_empty(h.shape), gate.new_empty(gate.shape)


def _setup_context(ctx, inputs, output):
    _, h, gate = inputs
    ctx.save_for_backward(h, gate)


def _backward(ctx, grad):
    return grad, *_op_backward(grad, *ctx.saved_tensors)


_op.register_autograd(_backward, setup_context=_setup_context)


def gated_residual(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """`x + gate * h`, computed in float32, returned in `x`'s dtype.

    Args:
        x: Residual stream `(B, N, D)`, floating.
        h: Branch output `(B, N, D)`, floating (under autocast it may differ from `x`).
        gate: `(B, D)`, any row stride, unit stride along D.

    Gradients pass to all three. Sums over frames are made from per-program partials in a fixed
    order, so they are deterministic.

    Raises:
        ValueError, TypeError: naming the argument, the expected and the given value.
    """
    checks.shape("x", x, "B", "N", "D")
    checks.floating("x", x)
    checks.shape("h", h, *x.shape)
    checks.floating("h", h)
    checks.same_device("h", h, x.device)
    check_modulation("gate", gate, x)
    if not dispatch.use_kernel(x, h, gate):
        return reference(x, h, gate)
    return _op(x, h, gate)
