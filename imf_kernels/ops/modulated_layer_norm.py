"""LayerNorm without affine, then scale and shift: `y = (1 + scale) * norm(x) + shift`.

`norm(x) = (x - mean) / sqrt(var + eps)` over the D channels of a frame; `scale` and `shift` are one
row of modulation per batch row, usually strided views (`modulation.chunk(6)`), read in place.
(DiT, arXiv 2212.09748, adaLN.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from imf_kernels import checks, dispatch
from imf_kernels.ops._dtypes import wide, wide_dtype
from imf_kernels.ops._rows import FRAMES_PER_PROGRAM, check_modulation, row_warps
from imf_kernels.ops._triton import accumulator, cdiv, jit, launch, next_power_of_2, tl


def reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Plain PyTorch, the specification."""
    norm = F.layer_norm(wide(x), x.shape[-1:], eps=eps)
    return (norm * (1 + wide(scale)[:, None]) + wide(shift)[:, None]).to(x.dtype)


@jit(do_not_specialize=["frames"])
def _forward_kernel(
    p_x,
    p_shift,
    p_scale,
    p_y,
    frames,
    stride_shift,
    stride_scale,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    frame = tl.program_id(0).to(tl.int64)
    row = frame // frames
    o = tl.arange(0, BLOCK_D)
    m = o < D
    b_x = tl.load(p_x + frame * D + o, mask=m, other=0.0).to(ACC)
    b_x = tl.where(m, b_x - tl.sum(b_x, 0) / D, 0.0)
    b_norm = b_x / tl.sqrt(tl.sum(b_x * b_x, 0) / D + eps)
    b_shift = tl.load(p_shift + row * stride_shift + o, mask=m, other=0.0).to(ACC)
    b_scale = tl.load(p_scale + row * stride_scale + o, mask=m, other=0.0).to(ACC)
    b_y = b_norm * (1 + b_scale) + b_shift
    tl.store(p_y + frame * D + o, b_y.to(p_y.dtype.element_ty), mask=m)


@jit(do_not_specialize=["frames"])
def _backward_kernel(
    p_grad,
    p_x,
    p_scale,
    p_grad_x,
    p_grad_shift,
    p_grad_scale,
    frames,
    stride_scale,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    FRAMES: tl.constexpr,
):
    """Gradient of `x` (the statistics are recomputed), one partial sum per program of the others.

    dx = (g - mean(g) - norm * mean(g * norm)) / std with g = dy * (1 + scale).
    """
    chunk = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    o = tl.arange(0, BLOCK_D)
    m = o < D
    b_gain = 1 + tl.load(p_scale + row * stride_scale + o, mask=m, other=0.0).to(ACC)
    b_sum_shift = tl.zeros([BLOCK_D], ACC)
    b_sum_scale = tl.zeros([BLOCK_D], ACC)
    for i in range(FRAMES):
        frame = chunk * FRAMES + i
        if frame < frames:
            o_frame = (row * frames + frame) * D + o
            b_x = tl.load(p_x + o_frame, mask=m, other=0.0).to(ACC)
            b_grad = tl.load(p_grad + o_frame, mask=m, other=0.0).to(ACC)
            b_x = tl.where(m, b_x - tl.sum(b_x, 0) / D, 0.0)
            rstd = 1 / tl.sqrt(tl.sum(b_x * b_x, 0) / D + eps)
            b_norm = b_x * rstd
            b_g = b_grad * b_gain
            b_grad_x = (b_g - tl.sum(b_g, 0) / D - b_norm * (tl.sum(b_g * b_norm, 0) / D)) * rstd
            tl.store(p_grad_x + o_frame, b_grad_x.to(p_grad_x.dtype.element_ty), mask=m)
            b_sum_shift += b_grad
            b_sum_scale += b_grad * b_norm
    o_partial = (row * tl.num_programs(0) + chunk) * D + o
    tl.store(p_grad_shift + o_partial, b_sum_shift, mask=m)
    tl.store(p_grad_scale + o_partial, b_sum_scale, mask=m)


def _launch_forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    rows, frames, dim = x.shape
    y = x.new_empty(x.shape)
    block = next_power_of_2(dim)
    launch(
        _forward_kernel,
        (rows * frames,),
        x,
        shift,
        scale,
        y,
        frames,
        shift.stride(0),
        scale.stride(0),
        eps,
        D=dim,
        BLOCK_D=block,
        ACC=accumulator(x),
        num_warps=row_warps(block),
    )
    return y


def _launch_backward(
    grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, frames, dim = x.shape
    chunks = cdiv(frames, FRAMES_PER_PROGRAM)
    grad_x = x.new_empty(x.shape)
    partials = x.new_empty((2, rows, chunks, dim), dtype=wide_dtype(x))
    block = next_power_of_2(dim)
    launch(
        _backward_kernel,
        (chunks, rows),
        grad,
        x,
        scale,
        grad_x,
        partials[0],
        partials[1],
        frames,
        scale.stride(0),
        eps,
        D=dim,
        BLOCK_D=block,
        ACC=accumulator(x),
        FRAMES=FRAMES_PER_PROGRAM,
        num_warps=row_warps(block),
    )
    return grad_x, partials[0].sum(1).to(shift.dtype), partials[1].sum(1).to(scale.dtype)


def _reference_backward(
    grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dy = wide(grad)
    centred = wide(x) - wide(x).mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    norm = centred * rstd
    g = dy * (1 + wide(scale)[:, None])
    grad_x = (g - g.mean(-1, keepdim=True) - norm * (g * norm).mean(-1, keepdim=True)) * rstd
    return grad_x.to(x.dtype), dy.sum(1).to(shift.dtype), (dy * norm).sum(1).to(scale.dtype)


@torch.library.custom_op("imf_kernels::modulated_layer_norm", mutates_args=())
def _op(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    if dispatch.runs_triton(x):
        return _launch_forward(x, shift, scale, eps)
    return reference(x, shift, scale, eps)


@_op.register_fake
def _(x, shift, scale, eps):
    return x.new_empty(x.shape)


@torch.library.custom_op("imf_kernels::modulated_layer_norm_backward", mutates_args=())
def _op_backward(
    grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    run = _launch_backward if dispatch.runs_triton(x) else _reference_backward
    return run(grad, x, shift, scale, eps)


@_op_backward.register_fake
def _(grad, x, shift, scale, eps):
    return x.new_empty(x.shape), shift.new_empty(shift.shape), scale.new_empty(scale.shape)


def _setup_context(ctx, inputs, output):
    x, shift, scale, ctx.eps = inputs
    ctx.save_for_backward(x, shift, scale)


def _backward(ctx, grad):
    return *_op_backward(grad, *ctx.saved_tensors, ctx.eps), None


_op.register_autograd(_backward, setup_context=_setup_context)


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """`norm(x) * (1 + scale) + shift`, computed in float32, returned in `x`'s dtype.

    Args:
        x: `(B, N, D)`, floating.
        shift, scale: `(B, D)`, any row stride, unit stride along D.
        eps: Added to the variance.

    Gradients pass to all three tensors, deterministically.

    Raises:
        ValueError, TypeError: naming the argument, the expected and the given value.
    """
    checks.shape("x", x, "B", "N", "D")
    checks.floating("x", x)
    check_modulation("shift", shift, x)
    check_modulation("scale", scale, x)
    if not dispatch.use_kernel(x, shift, scale):
        return reference(x, shift, scale, eps)
    return _op(x, shift, scale, eps)
