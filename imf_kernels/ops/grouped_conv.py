"""Grouped convolution over the frames of rows, Mish, residual: a position embedding in two calls.

    z[n] = bias + sum_k weight[:, :, k] x[n + k - K // 2]      (causal: x[n + k - (K - 1)])
    y[n] = mish(z[n]) + residual[n],    mish(z) = z tanh(softplus(z))

Frames outside the row of frame n count as zero, as if each row stood alone; frames of no row are
zero in `y`. (F5-TTS, arXiv 2410.06885, ConvPositionEmbedding.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from imf_kernels import checks, dispatch
from imf_kernels.ops._dtypes import wide, wide_dtype
from imf_kernels.ops._layout import contiguous
from imf_kernels.ops._mish import mish
from imf_kernels.ops._rows import check_rows, selected
from imf_kernels.ops._triton import (
    accumulator,
    cdiv,
    dot,
    jit,
    launch,
    next_power_of_2,
    tl,
    wait_for_predecessor,
)
from imf_kernels.rows import Rows


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: Rows,
    *,
    causal: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch, the specification."""
    z = convolved(selected(wide(x), rows), weight.to(x.dtype), bias, rows, causal)
    y = F.mish(z) if residual is None else F.mish(z) + wide(residual)
    return selected(y, rows).to(x.dtype)


def convolved(x: Tensor, weight: Tensor, bias: Tensor, rows: Rows, causal: bool = False) -> Tensor:
    """The convolution and its bias, in `x`'s dtype; frames of no row are finite and enter it."""
    line, at = _line(x, weight, rows, causal)
    return _convolve_line(line, weight, bias, at, causal)


def _left(taps: int, causal: bool) -> int:
    """Frames that the convolution sees before its own."""
    return taps - 1 if causal else taps // 2


def _line(x: Tensor, weight: Tensor, rows: Rows, causal: bool) -> tuple[Tensor, Tensor]:
    """All frames on one line, each row behind zeros as far as a tap reaches; and where they went.

    One convolution then serves padded and packed rows alike, without a row seeing another.
    """
    left = _left(weight.shape[2], causal)
    before = rows.row_of.diff(prepend=rows.row_of.new_full((1,), -1))
    first = (before != 0) & (rows.row_of >= 0)
    frame = torch.arange(x.shape[0], device=x.device)
    at = frame + left * (1 + first.cumsum(0))
    size = x.shape[0] + left * rows.lengths.shape[0] + weight.shape[2]
    return x.new_zeros(size, x.shape[1]).index_copy(0, at, x), at


def _convolve_line(line: Tensor, weight: Tensor, bias: Tensor, at: Tensor, causal: bool) -> Tensor:
    groups = line.shape[1] // weight.shape[1]
    z = F.conv1d(line.T[None], weight.to(line.dtype), bias.to(line.dtype), groups=groups)
    return z[0].T[at - _left(weight.shape[2], causal)]


@jit
def _row_bounds(p_starts, p_lengths, p_row_of, o_t, frames):
    """The first frame of each frame's row and the one behind its last; 0 and 0 for padding."""
    b_row = tl.load(p_row_of + o_t, mask=o_t < frames, other=-1)
    b_begin = tl.load(p_starts + b_row, mask=b_row >= 0, other=0)
    return b_begin, b_begin + tl.load(p_lengths + b_row, mask=b_row >= 0, other=0)


@jit
def _channels(block, CG: tl.constexpr, BLOCK_C: tl.constexpr):
    """First channel of a channel block's group, the block's channels, and which of them exist."""
    PER_GROUP: tl.constexpr = (CG + BLOCK_C - 1) // BLOCK_C
    first = block // PER_GROUP * CG
    o_c = block % PER_GROUP * BLOCK_C + tl.arange(0, BLOCK_C)
    return first, first + o_c, o_c < CG


@jit
def _taps(k, CG: tl.constexpr, TAPS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Places from k in the dimension of taps and channels; each one's tap, channel, existence."""
    o_k = k + tl.arange(0, BLOCK_K)
    return o_k, o_k // CG, o_k % CG, o_k < TAPS * CG


@jit
def _convolve(
    p_x,
    p_weight,
    p_starts,
    p_lengths,
    p_row_of,
    frames,
    D: tl.constexpr,
    CG: tl.constexpr,
    TAPS: tl.constexpr,
    LEFT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sums of a block of frames and channels; its channels, and which of those exist; where its
    first frame starts, and offsets from there; which frames have a row; what of it to store.

    Taps and the group's channels run as one dimension of TAPS * CG, so that few channels still
    fill a dot and 48 need no padding to 64.
    """
    frame = tl.program_id(0).to(tl.int64) * BLOCK_T
    first, o_c, m_c = _channels(tl.program_id(1), CG, BLOCK_C)
    o_t = frame + tl.arange(0, BLOCK_T)
    b_begin, b_end = _row_bounds(p_starts, p_lengths, p_row_of, o_t, frames)
    b_before = (b_begin - o_t).to(tl.int32)  # the row, seen from each of its frames
    b_behind = (b_end - o_t).to(tl.int32)
    p_frame = p_x + frame * D + first
    o_row = tl.arange(0, BLOCK_T) * D
    b_acc = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    if tl.max(b_end, 0) > 0:  # not a block of padding alone
        for k in range(0, TAPS * CG, BLOCK_K):
            o_k, b_tap, o_in, m_k = _taps(k, CG, TAPS, BLOCK_K)
            b_shift = b_tap[None, :] - LEFT
            m_x = (b_shift >= b_before[:, None]) & (b_shift < b_behind[:, None])
            o_x = o_row[:, None] + (b_shift * D + o_in[None, :])
            b_x = tl.load(p_frame + o_x, mask=m_x & m_k[None, :], other=0.0)
            o_w = o_c[None, :] * (TAPS * CG) + o_k[:, None]
            b_w = tl.load(p_weight + o_w, mask=m_c[None, :] & m_k[:, None], other=0.0)
            b_acc += dot(b_x, b_w, ACC)
    o = o_row[:, None] + o_c[None, :]
    m = (o_t < frames)[:, None] & m_c[None, :]
    return b_acc, o_c, m_c, frame * D, o, (b_end > 0)[:, None], m


@jit(do_not_specialize=["frames"])
def _forward_kernel(
    p_x,
    p_weight,
    p_bias,
    p_starts,
    p_lengths,
    p_row_of,
    p_residual,
    p_y,
    frames,
    D: tl.constexpr,
    CG: tl.constexpr,
    TAPS: tl.constexpr,
    LEFT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    wait_for_predecessor()
    b_acc, o_c, m_c, base, o, m_valid, m = _convolve(
        p_x, p_weight, p_starts, p_lengths, p_row_of, frames,
        D, CG, TAPS, LEFT, BLOCK_T, BLOCK_C, BLOCK_K, ACC,
    )  # fmt: skip
    b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(ACC)
    b_y, _ = mish(b_acc + b_bias[None, :])
    if p_residual is not None:
        b_y += tl.load(p_residual + base + o, mask=m & m_valid, other=0.0).to(ACC)
    tl.store(p_y + base + o, tl.where(m_valid, b_y, 0.0).to(p_y.dtype.element_ty), mask=m)


@jit(do_not_specialize=["frames"])
def _grad_z_kernel(
    p_grad,
    p_x,
    p_weight,
    p_bias,
    p_starts,
    p_lengths,
    p_row_of,
    p_grad_z,
    p_grad_bias,
    frames,
    D: tl.constexpr,
    CG: tl.constexpr,
    TAPS: tl.constexpr,
    LEFT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradient before Mish (z is recomputed), and its sum over each block of frames."""
    wait_for_predecessor()
    b_acc, o_c, m_c, base, o, m_valid, m = _convolve(
        p_x, p_weight, p_starts, p_lengths, p_row_of, frames,
        D, CG, TAPS, LEFT, BLOCK_T, BLOCK_C, BLOCK_K, ACC,
    )  # fmt: skip
    b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(ACC)
    _, b_slope = mish(b_acc + b_bias[None, :])
    b_grad = tl.load(p_grad + base + o, mask=m & m_valid, other=0.0).to(ACC)
    b_grad_z = tl.where(m_valid, b_grad * b_slope, 0.0)
    tl.store(p_grad_z + base + o, b_grad_z.to(p_grad_z.dtype.element_ty), mask=m)
    o_partial = tl.program_id(0).to(tl.int64) * D + o_c
    tl.store(p_grad_bias + o_partial, tl.sum(b_grad_z, 0), mask=m_c)


@jit(do_not_specialize=["frames"])
def _grad_x_kernel(
    p_grad_z,
    p_weight,
    p_starts,
    p_lengths,
    p_row_of,
    p_grad_x,
    frames,
    D: tl.constexpr,
    CG: tl.constexpr,
    TAPS: tl.constexpr,
    LEFT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    wait_for_predecessor()
    b_acc, _, _, base, o, _, m = _convolve(
        p_grad_z, p_weight, p_starts, p_lengths, p_row_of, frames,
        D, CG, TAPS, LEFT, BLOCK_T, BLOCK_C, BLOCK_K, ACC,
    )  # fmt: skip
    tl.store(p_grad_x + base + o, b_acc.to(p_grad_x.dtype.element_ty), mask=m)


@jit(do_not_specialize=["frames", "frames_per_split"])
def _grad_weight_kernel(
    p_grad_z,
    p_x,
    p_starts,
    p_lengths,
    p_row_of,
    p_grad_weight,
    frames,
    frames_per_split,
    D: tl.constexpr,
    CG: tl.constexpr,
    TAPS: tl.constexpr,
    LEFT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    """One split's partial sum of a block of the weight's gradient, `(D, TAPS * CG)`."""
    wait_for_predecessor()
    first, o_c, m_c = _channels(tl.program_id(1), CG, BLOCK_C)
    split = tl.program_id(2).to(tl.int64)
    o_k, b_tap, o_in, m_k = _taps(tl.program_id(0) * BLOCK_K, CG, TAPS, BLOCK_K)
    b_shift = b_tap[None, :] - LEFT
    o_block = tl.arange(0, BLOCK_T)
    o_x = o_block[:, None] * D + (first + b_shift * D + o_in[None, :])
    o_z = o_block[:, None] * D + o_c[None, :]
    b_acc = tl.zeros([BLOCK_C, BLOCK_K], ACC)
    begin = split * frames_per_split
    for frame in range(begin, tl.minimum(begin + frames_per_split, frames), BLOCK_T):
        o_t = frame + o_block
        b_begin, b_end = _row_bounds(p_starts, p_lengths, p_row_of, o_t, frames)
        b_before, b_behind = (b_begin - o_t).to(tl.int32), (b_end - o_t).to(tl.int32)
        m_x = (b_shift >= b_before[:, None]) & (b_shift < b_behind[:, None])
        b_x = tl.load(p_x + frame * D + o_x, mask=m_x & m_k[None, :], other=0.0)
        m_z = (o_t < frames)[:, None] & m_c[None, :]
        b_z = tl.load(p_grad_z + frame * D + o_z, mask=m_z, other=0.0)
        b_acc += dot(tl.trans(b_z), b_x, ACC)
    o_weight = (split * D + o_c[:, None]) * (TAPS * CG) + o_k[None, :]
    tl.store(p_grad_weight + o_weight, b_acc, mask=m_c[:, None] & m_k[None, :])


PROGRAMS = 512
"""Programs that fill a large GPU: the weight's gradient splits the frames until it has them."""


class _Blocks(NamedTuple):
    """What one program takes, `taps` counting in the joint dimension of taps and channels."""

    frames: int
    channels: int
    taps: int
    warps: int
    stages: int

    def constants(self, x: Tensor, weight: Tensor, left: int) -> dict[str, Any]:
        return {
            "D": x.shape[1],
            "CG": weight.shape[1],
            "TAPS": weight.shape[2],
            "LEFT": left,
            "BLOCK_T": self.frames,
            "BLOCK_C": self.channels,
            "BLOCK_K": self.taps,
            "ACC": accumulator(x),
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def _convolution_blocks(x: Tensor, weight: Tensor) -> _Blocks:
    channels = max(next_power_of_2(weight.shape[1]), 16)
    if x.element_size() == 2:
        return _Blocks(64, min(channels, 64), 64, 4, 3)
    if x.dtype == torch.float32:
        return _Blocks(64, min(channels, 64), 32, 8, 2)
    return _Blocks(32, min(channels, 32), 16, 4, 1)


def _grad_weight_blocks(x: Tensor, weight: Tensor) -> _Blocks:
    channels = max(next_power_of_2(weight.shape[1]), 16)
    if x.element_size() == 2:
        return _Blocks(64, min(channels, 64), 128, 4, 3)
    if x.dtype == torch.float32:
        return _Blocks(32, min(channels, 64), 64, 4, 2)
    return _Blocks(16, min(channels, 32), 32, 4, 1)


def _channel_blocks(weight: Tensor, blocks: _Blocks) -> int:
    return weight.shape[0] // weight.shape[1] * cdiv(weight.shape[1], blocks.channels)


def _taps_before_channels(weight: Tensor, x: Tensor) -> Tensor:
    """`(D, K, D / groups)`, whose dot operands lie in whole 16-byte pieces.

    As nn.Conv1d stores it, a tap's values are K apart: every 32-byte sector read for one of them,
    in each block of frames; one copy per call is far less. None is made where it lies so already.
    """
    return weight.to(x.dtype).transpose(1, 2).contiguous()


def _launch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    starts: Tensor,
    lengths: Tensor,
    row_of: Tensor,
    causal: bool,
    residual: Tensor | None,
) -> Tensor:
    frames = x.shape[0]
    y = x.new_empty(x.shape)
    blocks = _convolution_blocks(x, weight)
    launch(
        _forward_kernel,
        (cdiv(frames, blocks.frames), _channel_blocks(weight, blocks)),
        x,
        _taps_before_channels(weight, x),
        bias,
        starts,
        lengths,
        row_of,
        residual,
        y,
        frames,
        **blocks.constants(x, weight, _left(weight.shape[2], causal)),
    )
    return y


def _launch_grad_z(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    starts: Tensor,
    lengths: Tensor,
    row_of: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    frames, dim = x.shape
    blocks = _convolution_blocks(x, weight)
    time_blocks = cdiv(frames, blocks.frames)
    grad_z = x.new_empty(x.shape)
    partials = x.new_empty((time_blocks, dim), dtype=wide_dtype(x))
    launch(
        _grad_z_kernel,
        (time_blocks, _channel_blocks(weight, blocks)),
        grad,
        x,
        _taps_before_channels(weight, x),
        bias,
        starts,
        lengths,
        row_of,
        grad_z,
        partials,
        frames,
        **blocks.constants(x, weight, _left(weight.shape[2], causal)),
    )
    return grad_z, partials.sum(0).to(bias.dtype)


def _launch_grad_x(
    grad_z: Tensor, weight: Tensor, starts: Tensor, lengths: Tensor, row_of: Tensor, causal: bool
) -> Tensor:
    """The same convolution with taps flipped, and the channels of a group exchanged."""
    frames, dim = grad_z.shape
    width, taps = weight.shape[1:]
    flipped = weight.to(grad_z.dtype).unflatten(0, (-1, width)).flip(-1).permute(0, 2, 3, 1)
    blocks = _convolution_blocks(grad_z, weight)
    grad_x = grad_z.new_empty(grad_z.shape)
    launch(
        _grad_x_kernel,
        (cdiv(frames, blocks.frames), _channel_blocks(weight, blocks)),
        grad_z,
        flipped.reshape(dim, taps, width),
        starts,
        lengths,
        row_of,
        grad_x,
        frames,
        **blocks.constants(grad_z, weight, taps - 1 - _left(taps, causal)),
    )
    return grad_x


def _launch_grad_weight(
    grad_z: Tensor,
    x: Tensor,
    weight: Tensor,
    starts: Tensor,
    lengths: Tensor,
    row_of: Tensor,
    causal: bool,
) -> Tensor:
    frames, dim = x.shape
    width, taps = weight.shape[1:]
    blocks = _grad_weight_blocks(x, weight)
    tiles = cdiv(taps * width, blocks.taps), _channel_blocks(weight, blocks)
    time_blocks = cdiv(frames, blocks.frames)
    splits = max(min(PROGRAMS // (tiles[0] * tiles[1]), time_blocks // 4), 1)
    partials = x.new_empty((splits, dim, taps, width), dtype=wide_dtype(x))
    launch(
        _grad_weight_kernel,
        (*tiles, splits),
        grad_z,
        x,
        starts,
        lengths,
        row_of,
        partials,
        frames,
        cdiv(time_blocks, splits) * blocks.frames,
        **blocks.constants(x, weight, _left(taps, causal)),
    )
    return partials.sum(0).to(weight.dtype).transpose(1, 2).contiguous()


def _launch_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    starts: Tensor,
    lengths: Tensor,
    row_of: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = starts, lengths, row_of, causal
    grad_z, grad_bias = _launch_grad_z(grad, x, weight, bias, *rows)
    grad_x = _launch_grad_x(grad_z, weight, *rows)
    return grad_x, _launch_grad_weight(grad_z, x, weight, *rows), grad_bias


def _reference_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    starts: Tensor,
    lengths: Tensor,
    row_of: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = Rows(starts, lengths, row_of, x.shape[0])
    line, at = _line(selected(wide(x), rows), weight, rows, causal)
    w = weight.to(x.dtype).to(line.dtype)
    z = _convolve_line(line, w, bias, at, causal)
    dz = selected(torch.ops.aten.mish_backward(wide(grad), z), rows)
    dz_line = dz.new_zeros(line.shape[0] - w.shape[2] + 1, x.shape[1]).index_copy(
        0, at - _left(w.shape[2], causal), dz
    )
    groups = w.shape[0] // w.shape[1]
    dx, dw, db = torch.ops.aten.convolution_backward(
        dz_line.T[None], line.T[None], w, [w.shape[0]],
        [1], [0], [1], False, [0], groups, [True, True, True],
    )  # fmt: skip
    dx = selected(dx[0].T[at], rows)
    return dx.to(x.dtype), dw.to(weight.dtype).contiguous(), db.to(bias.dtype)


@torch.library.custom_op("imf_kernels::grouped_conv_mish", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    starts: Tensor,
    lengths: Tensor,
    row_of: Tensor,
    causal: bool,
    residual: Tensor | None,
) -> Tensor:
    if not dispatch.runs_triton(x):
        rows = Rows(starts, lengths, row_of, x.shape[0])
        return reference(x, weight, bias, rows, causal=causal, residual=residual)
    x, bias, starts, lengths, row_of, residual = contiguous(
        x, bias, starts, lengths, row_of, residual
    )
    return _launch_forward(x, weight, bias, starts, lengths, row_of, causal, residual)


@_op.register_fake
def _(x, weight, bias, starts, lengths, row_of, causal, residual):
    return x.new_empty(x.shape)


@torch.library.custom_op("imf_kernels::grouped_conv_mish_backward", mutates_args=())
def _op_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    starts: Tensor,
    lengths: Tensor,
    row_of: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    run = _launch_backward if dispatch.runs_triton(x) else _reference_backward
    grad, x, bias, starts, lengths, row_of = contiguous(grad, x, bias, starts, lengths, row_of)
    return run(grad, x, weight, bias, starts, lengths, row_of, causal)


@_op_backward.register_fake
def _(grad, x, weight, bias, starts, lengths, row_of, causal):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.causal, residual = inputs
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    tensors = ctx.saved_tensors
    grads = _op_backward(grad, *tensors, ctx.causal)
    if not ctx.needs_input_grad[-1]:
        return *grads, None, None, None, None, None
    grad_residual = torch.where((tensors[-1] >= 0)[:, None], grad, 0).to(ctx.residual_dtype)
    return *grads, None, None, None, None, grad_residual


_op.register_autograd(_backward, setup_context=_setup_context)


def grouped_conv_mish(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: Rows,
    *,
    causal: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """`mish(conv(x)) + residual` over each row on its own, computed in float32: `(T, D)`.

    Args:
        x: Frames `(T, D)`, floating; those of no row may hold anything.
        weight: `(D, D / groups, K)` as nn.Conv1d stores it, floating, multiplied in `x`'s dtype;
            K is odd unless `causal`. Kernels read it as `(D, K, D / groups)`: a weight whose
            strides are already so, `(K * C, 1, C)` for C = D / groups, is not copied.
        bias: `(D,)`, floating.
        rows: Which frames belong together; others yield zero.
        causal: See the K - 1 frames before a frame instead of K // 2 on both sides.
        residual: Added behind Mish, `(T, D)`, floating.

    The result has `x`'s dtype. Gradients pass to all four tensors, deterministically; the sums
    before Mish are recomputed for them.

    Raises:
        ValueError, TypeError: naming the argument, the expected and the given value.
    """
    _check(x, weight, bias, rows, causal, residual)
    if not dispatch.use_kernel(x, weight, bias, residual):
        return reference(x, weight, bias, rows, causal=causal, residual=residual)
    return _op(x, weight, bias, rows.starts, rows.lengths, rows.row_of, causal, residual)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, rows: Rows, causal: bool, residual: Tensor | None
) -> None:
    checks.shape("x", x, "T", "D")
    checks.floating("x", x)
    dim = x.shape[1]
    checks.shape("weight", weight, dim, "D / groups", "K")
    width, taps = weight.shape[1:]
    if width < 1 or dim % width:
        raise ValueError(f"weight: expected D / groups to divide D = {dim}, got {width}")
    if taps < 1 or not (causal or taps % 2):
        raise ValueError(f"weight: expected an odd number of taps K unless causal, got {taps}")
    checks.shape("bias", bias, dim)
    for name, tensor in (("weight", weight), ("bias", bias)):
        checks.floating(name, tensor)
        checks.same_device(name, tensor, x.device)
    check_rows(rows, x)
    if residual is not None:
        checks.shape("residual", residual, *x.shape)
        checks.floating("residual", residual)
        checks.same_device("residual", residual, x.device)
