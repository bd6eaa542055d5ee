"""GELU and ConvNeXt V2's global response norm, between a block's two matrix products:

    g = gelu(h)                                              exact, by erf
    G[c] = sqrt(sum over the row's frames n of g[n, c]^2)
    y[n, c] = g[n, c] (1 + gamma[c] G[c] / (mean(G) + 1e-6)) + beta[c]

Each row has its own G; its mean is over channels. (ConvNeXt V2, arXiv 2301.00808.) Two passes over
h, and nothing of its size is kept: the first sums the squares of CHUNKS parts of each row, which
depend on the row's own length and start alone; the second adds them up and applies them. The
backward takes its sums the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from imf_kernels import checks, dispatch
from imf_kernels.ops._dtypes import wide, wide_dtype
from imf_kernels.ops._layout import contiguous
from imf_kernels.ops._rows import check_rows, per_frame, row_sums, selected
from imf_kernels.ops._triton import (
    accumulator,
    cdiv,
    jit,
    launch,
    next_power_of_2,
    tl,
    wait_for_predecessor,
)
from imf_kernels.rows import Rows

EPS = 1e-6
CHUNKS = 8
"""Parts of a row: few, as every program of the second pass adds them up; with 16 blocks of channels
beside them one row still fills a GPU."""


def reference(h: Tensor, gamma: Tensor, beta: Tensor, rows: Rows) -> Tensor:
    """Plain PyTorch, the specification."""
    g = F.gelu(wide(selected(h, rows)))
    squares = row_sums(g.square(), rows)
    alive = squares > 0  # a root has no slope at 0
    norms = torch.where(alive, torch.where(alive, squares, 1.0).sqrt(), 0.0)
    gain = 1 + wide(gamma) * norms / (norms.mean(-1, keepdim=True) + EPS)
    return selected((g * per_frame(gain, rows) + wide(beta)).to(h.dtype), rows)


@jit
def _gelu(b_h):
    return 0.5 * b_h * (1 + tl.erf(b_h * 0.7071067811865476))


@jit
def _sums_kernel(
    p_h,
    p_grad,
    p_starts,
    p_lengths,
    p_sums,
    stride_sums,
    D: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sums of g^2, and with a gradient of g dy, over one part of a row."""
    wait_for_predecessor()
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    o_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    start = tl.load(p_starts + row).to(tl.int64)
    length = tl.load(p_lengths + row)
    size = tl.cdiv(length, CHUNKS)
    end = tl.minimum((chunk + 1) * size, length)
    b_squares = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    b_products = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for frame in range(chunk * size, end, BLOCK_M):
        o_m = frame + tl.arange(0, BLOCK_M)
        m = (o_m < end)[:, None] & m_d[None, :]
        o = (start + o_m)[:, None] * D + o_d[None, :]
        b_g = _gelu(tl.load(p_h + o, mask=m, other=0.0).to(ACC))
        b_squares += b_g * b_g
        if HAS_GRAD:
            b_products += b_g * tl.load(p_grad + o, mask=m, other=0.0).to(ACC)
    p_sum = p_sums + (row * CHUNKS + chunk) * D + o_d
    tl.store(p_sum, tl.sum(b_squares, 0), mask=m_d)
    if HAS_GRAD:
        tl.store(p_sum + stride_sums, tl.sum(b_products, 0), mask=m_d)


@jit(do_not_specialize=["frames"])
def _forward_kernel(
    p_h,
    p_sums,
    p_gamma,
    p_beta,
    p_row_of,
    p_y,
    frames,
    eps,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    wait_for_predecessor()
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    o_m = first + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o = o_m[:, None] * D + o_d[None, :]
    o_sums = tl.arange(0, CHUNKS)[:, None] * D + o_d[None, :]
    b_row = tl.load(p_row_of + o_m, mask=o_m < frames, other=-1).to(tl.int64)
    m_row = (b_row >= 0)[:, None]
    b_h = tl.load(p_h + o, mask=m_row & m_d[None, :], other=0.0)
    b_gamma = tl.load(p_gamma + o_d, mask=m_d, other=0.0).to(ACC)
    b_gain = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    last = tl.max(b_row, 0)
    least = tl.min(tl.where(b_row < 0, last, b_row), 0)
    for row in range(tl.maximum(least, 0), last + 1):  # mostly one
        b_sums = tl.load(p_sums + row * (CHUNKS * D) + o_sums, mask=m_d[None, :], other=0.0)
        b_norms = tl.sqrt(tl.sum(b_sums, 0))
        b_response = b_norms / (tl.sum(b_norms, 0) / D + eps)
        b_gain = tl.where((b_row == row)[:, None], (1 + b_gamma * b_response)[None, :], b_gain)
    b_beta = tl.load(p_beta + o_d, mask=m_d, other=0.0).to(ACC)
    b_y = tl.where(m_row, _gelu(b_h.to(ACC)) * b_gain + b_beta[None, :], 0.0)
    tl.store(p_y + o, b_y.to(p_y.dtype.element_ty), mask=(o_m < frames)[:, None] & m_d[None, :])


def _launch_sums(h: Tensor, grad: Tensor | None, starts: Tensor, lengths: Tensor) -> Tensor:
    """Of g^2, and with a gradient of g dy, over the parts of rows: `(1 or 2, R, CHUNKS, D)`."""
    count, dim = lengths.shape[0], h.shape[1]
    sums = h.new_empty((1 if grad is None else 2, count, CHUNKS, dim), dtype=wide_dtype(h))
    block = min(next_power_of_2(dim), 64)
    launch(
        _sums_kernel,
        (count, CHUNKS, cdiv(dim, block)),
        h,
        grad,
        starts,
        lengths,
        sums,
        sums.stride(0),
        D=dim,
        HAS_GRAD=grad is not None,
        CHUNKS=CHUNKS,
        BLOCK_M=32,
        BLOCK_D=block,
        ACC=accumulator(h),
        num_warps=4,
    )
    return sums


def _launch_forward(
    h: Tensor, gamma: Tensor, beta: Tensor, starts: Tensor, lengths: Tensor, row_of: Tensor
) -> Tensor:
    frames, dim = h.shape
    y = h.new_empty(h.shape)
    block_m = 4
    launch(
        _forward_kernel,
        (cdiv(frames, block_m),),
        h,
        _launch_sums(h, None, starts, lengths),
        gamma,
        beta,
        row_of,
        y,
        frames,
        EPS,
        D=dim,
        CHUNKS=CHUNKS,
        BLOCK_M=block_m,
        BLOCK_D=next_power_of_2(dim),
        ACC=accumulator(h),
        num_warps=8,
    )
    return y


@torch.library.custom_op("imf_kernels::grn_gelu", mutates_args=())
def _op(
    h: Tensor,
    gamma: Tensor,
    beta: Tensor,
    starts: Tensor,
    lengths: Tensor,
    row_of: Tensor,
    longest: int,
) -> Tensor:
    h, gamma, beta, starts, lengths, row_of = contiguous(h, gamma, beta, starts, lengths, row_of)
    if dispatch.runs_triton(h):
        return _launch_forward(h, gamma, beta, starts, lengths, row_of)
    return reference(h, gamma, beta, Rows(starts, lengths, row_of, longest))


@_op.register_fake
def _(h, gamma, beta, starts, lengths, row_of, longest):
    return h.new_empty(h.shape)


@torch.library.custom_op("imf_kernels::grn_gelu_sums", mutates_args=())
def _op_sums(
    h: Tensor, grad: Tensor, starts: Tensor, lengths: Tensor, row_of: Tensor, longest: int
) -> Tensor:
    """Of g^2 and of g dy over each row: wide `(2, R, D)`."""
    h, grad, starts, lengths = contiguous(h, grad, starts, lengths)
    if dispatch.runs_triton(h):
        return _launch_sums(h, grad, starts, lengths).sum(2)
    rows = Rows(starts, lengths, row_of, longest)
    g = F.gelu(wide(selected(h, rows)))
    return torch.stack([row_sums(g.square(), rows), row_sums(g * wide(grad), rows)])


@_op_sums.register_fake
def _(h, grad, starts, lengths, row_of, longest):
    return h.new_empty((2, lengths.shape[0], h.shape[1]), dtype=wide_dtype(h))


def _setup_context(ctx, inputs, output):
    h, gamma, beta, *layout, ctx.longest = inputs
    ctx.save_for_backward(h, gamma, *layout)
    ctx.beta_dtype = beta.dtype


def _backward(ctx, grad):
    """dg = dy gain + g dG / G, G's gradient passing through its mean as well."""
    h, gamma, starts, lengths, row_of = ctx.saved_tensors
    rows = Rows(starts, lengths, row_of, ctx.longest)
    squares, products = _op_sums(h, grad, *rows)
    norms = squares.sqrt()
    mean = norms.mean(-1, keepdim=True) + EPS
    response, grad_response = norms / mean, products * wide(gamma)
    grad_norms = (grad_response - (grad_response * response).mean(-1, keepdim=True)) / mean
    slope = torch.where(norms > 0, grad_norms / norms, 0.0)
    h, dy = wide(selected(h, rows)), wide(selected(grad, rows))
    dg = dy * per_frame(1 + wide(gamma) * response, rows) + F.gelu(h) * per_frame(slope, rows)
    return (
        torch.ops.aten.gelu_backward(dg, h).to(grad.dtype),
        (products * response).sum(0).to(gamma.dtype),
        dy.sum(0).to(ctx.beta_dtype),
        *[None] * 4,
    )


_op.register_autograd(_backward, setup_context=_setup_context)


def grn_gelu(h: Tensor, gamma: Tensor, beta: Tensor, rows: Rows) -> Tensor:
    """`g + gamma * (g * G / (mean(G) + 1e-6)) + beta` for `g = gelu(h)`, computed in float32.

    Args:
        h: Frames `(T, D)`, floating; those of no row may hold anything.
        gamma, beta: `(D,)`, floating.
        rows: Which frames belong together; others enter no row's G, and yield zero.

    Returns:
        `(T, D)` in the dtype of `h`.

    Gradients pass to all three tensors, deterministically; that of a norm G is 0 where it is 0.

    Raises:
        ValueError, TypeError: naming the argument, the expected and the given value.
    """
    checks.shape("h", h, "T", "D")
    checks.floating("h", h)
    for name, tensor in (("gamma", gamma), ("beta", beta)):
        checks.shape(name, tensor, h.shape[1])
        checks.floating(name, tensor)
        checks.same_device(name, tensor, h.device)
    check_rows(rows, h)
    if not dispatch.use_kernel(h, gamma, beta):
        return reference(h, gamma, beta, rows)
    return _op(h, gamma, beta, *rows)
