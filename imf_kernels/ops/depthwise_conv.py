"""The head of a ConvNeXt block: a depthwise convolution of the frames of rows, and LayerNorm.

    z[n] = bias + sum_k weight[:, k] x[n + k - K // 2]        channel by channel
    y[n] = norm(z[n]) * gamma + beta

`norm(z) = (z - mean) / sqrt(var + eps)` over the channels of a frame. Frames outside the row of
frame n count as zero, as if each row stood alone; frames of no row are zero in `y`. A program holds
all channels of a few frames, so that z is never written. (ConvNeXt, arXiv 2201.03545.)

The backward recomputes z, in plain PyTorch: the op runs once per utterance, outside of solves.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from imf_kernels import checks, dispatch
from imf_kernels.ops._dtypes import wide
from imf_kernels.ops._layout import contiguous
from imf_kernels.ops._rows import check_rows, selected
from imf_kernels.ops._triton import (
    accumulator,
    cdiv,
    jit,
    launch,
    next_power_of_2,
    tl,
    wait_for_predecessor,
)
from imf_kernels.ops.grouped_conv import convolved
from imf_kernels.rows import Rows

BLOCK_M = 4
"""Frames per program: few, for one short row to spread over a GPU."""


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    rows: Rows,
    eps: float,
) -> Tensor:
    """Plain PyTorch, the specification."""
    z = convolved(selected(wide(x), rows), weight, bias, rows)
    y = F.layer_norm(z, gamma.shape, gamma.to(z.dtype), beta.to(z.dtype), eps)
    return selected(y.to(x.dtype), rows)


@jit(do_not_specialize=["frames"])
def _forward_kernel(
    p_x,
    p_weight,
    p_bias,
    p_gamma,
    p_beta,
    p_row_of,
    p_y,
    frames,
    eps,
    D: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """A block of frames, whatever rows they are of: each reads its own row alone."""
    wait_for_predecessor()
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    o_m = first + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_row = tl.load(p_row_of + o_m, mask=o_m < frames, other=-1)
    m_row = b_row >= 0
    b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(ACC)
    b_z = tl.zeros([BLOCK_M, BLOCK_D], ACC) + b_bias[None, :]
    for tap in tl.static_range(TAPS):
        o_there = o_m + (tap - TAPS // 2)
        m_there = m_row & (o_there >= 0) & (o_there < frames)
        m_there &= tl.load(p_row_of + o_there, mask=m_there, other=-1) == b_row
        m_x = m_there[:, None] & m_d[None, :]
        b_x = tl.load(p_x + o_there[:, None] * D + o_d[None, :], mask=m_x, other=0.0).to(ACC)
        b_weight = tl.load(p_weight + o_d * TAPS + tap, mask=m_d, other=0.0).to(ACC)
        b_z += b_x * b_weight[None, :]
    b_z = tl.where(m_d[None, :], b_z - (tl.sum(b_z, 1) / D)[:, None], 0.0)
    b_norm = b_z / tl.sqrt(tl.sum(b_z * b_z, 1) / D + eps)[:, None]
    b_gamma = tl.load(p_gamma + o_d, mask=m_d, other=0.0).to(ACC)
    b_beta = tl.load(p_beta + o_d, mask=m_d, other=0.0).to(ACC)
    b_y = tl.where(m_row[:, None], b_norm * b_gamma[None, :] + b_beta[None, :], 0.0)
    m_y = (o_m < frames)[:, None] & m_d[None, :]
    tl.store(p_y + o_m[:, None] * D + o_d[None, :], b_y.to(p_y.dtype.element_ty), mask=m_y)


def _launch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    row_of: Tensor,
    eps: float,
) -> Tensor:
    frames, dim = x.shape
    y = x.new_empty(x.shape)
    block = next_power_of_2(dim)
    launch(
        _forward_kernel,
        (cdiv(frames, BLOCK_M),),
        x,
        weight,
        bias,
        gamma,
        beta,
        row_of,
        y,
        frames,
        eps,
        D=dim,
        TAPS=weight.shape[2],
        BLOCK_M=BLOCK_M,
        BLOCK_D=block,
        ACC=accumulator(x),
        num_warps=min(max(block // 128, 1), 8),  # 16 bytes a thread and frame in half precision
    )
    return y


@torch.library.custom_op("imf_kernels::depthwise_conv_norm", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    starts: Tensor,
    lengths: Tensor,
    row_of: Tensor,
    longest: int,
    eps: float,
) -> Tensor:
    x, weight, bias, gamma, beta, row_of = contiguous(x, weight, bias, gamma, beta, row_of)
    if dispatch.runs_triton(x):
        return _launch_forward(x, weight, bias, gamma, beta, row_of, eps)
    return reference(x, weight, bias, gamma, beta, Rows(starts, lengths, row_of, longest), eps)


@_op.register_fake
def _(x, weight, bias, gamma, beta, starts, lengths, row_of, longest, eps):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.longest, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    """dz = (g - mean(g) - norm mean(g norm)) / std with g = dy gamma."""
    x, weight, bias, gamma, beta, starts, lengths, row_of = ctx.saved_tensors
    rows = Rows(starts, lengths, row_of, ctx.longest)
    x, dy, taps = wide(selected(x, rows)), wide(selected(grad, rows)), wide(weight[:, 0]).unbind(1)
    z = wide(bias) + _weighted(x, taps, rows)
    z = z - z.mean(-1, keepdim=True)
    rstd = (z.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
    norm, g = z * rstd, dy * wide(gamma)
    dz = (g - g.mean(-1, keepdim=True) - norm * (g * norm).mean(-1, keepdim=True)) * rstd
    grad_weight = torch.stack([(dz * there).sum(0) for there in _seen(x, len(taps), rows)], dim=-1)
    return (
        _weighted(dz, taps[::-1], rows).to(grad.dtype),
        grad_weight[:, None].to(weight.dtype),
        dz.sum(0).to(bias.dtype),
        (dy * norm).sum(0).to(gamma.dtype),
        dy.sum(0).to(beta.dtype),
        *[None] * 5,
    )


def _weighted(x: Tensor, taps: tuple[Tensor, ...], rows: Rows) -> Tensor:
    """What the taps see, weighted and added up: the convolution without its bias."""
    y = torch.zeros_like(x)
    for tap, there in zip(taps, _seen(x, len(taps), rows), strict=True):
        y = torch.addcmul(y, tap, there)
    return y


def _seen(x: Tensor, taps: int, rows: Rows) -> Iterator[Tensor]:
    """What each tap sees at every frame: `(T, D)`, zero outside of the frame's row."""
    half, frames = taps // 2, len(x)
    around = F.pad(x, (0, 0, half, half))
    row_of = F.pad(rows.row_of, (half, half), value=-1)
    for tap in range(taps):
        same = (row_of[tap : tap + frames] == rows.row_of) & (rows.row_of >= 0)
        yield torch.where(same[:, None], around[tap : tap + frames], 0.0)


_op.register_autograd(_backward, setup_context=_setup_context)


def depthwise_conv_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    rows: Rows,
    eps: float = 1e-6,
) -> Tensor:
    """`norm(conv(x) + bias) * gamma + beta` over each row on its own, computed in float32.

    Args:
        x: Frames `(T, D)`, floating; those of no row may hold anything.
        weight: `(D, 1, K)` as nn.Conv1d stores it for D groups, floating, K odd.
        bias, gamma, beta: `(D,)`, floating.
        rows: Which frames belong together; others yield zero.
        eps: Added to the variance.

    Returns:
        `(T, D)` in the dtype of `x`.

    Gradients pass to all five tensors, deterministically.

    Raises:
        ValueError, TypeError: naming the argument, the expected and the given value.
    """
    checks.shape("x", x, "T", "D")
    checks.floating("x", x)
    dim = x.shape[1]
    checks.shape("weight", weight, dim, 1, "K")
    if weight.shape[2] % 2 == 0:
        raise ValueError(f"weight: expected an odd number of taps K, got {weight.shape[2]}")
    channels = {"bias": bias, "gamma": gamma, "beta": beta}
    for name, tensor in channels.items():
        checks.shape(name, tensor, dim)
    for name, tensor in ({"weight": weight} | channels).items():
        checks.floating(name, tensor)
        checks.same_device(name, tensor, x.device)
    check_rows(rows, x)
    if not dispatch.use_kernel(x, weight, bias, gamma, beta):
        return reference(x, weight, bias, gamma, beta, rows, eps)
    return _op(x, weight, bias, gamma, beta, *rows, eps)
