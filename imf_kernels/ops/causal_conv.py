"""A causal convolution of the frames of rows, and the block of CosyVoice2's U-Net around it:

    h = conv(x) + bias [+ addend]                         each frame and those before it in its row
    y = mish(norm(h) * gamma + beta) [+ shift] [+ residual]

`norm(h) = (h - mean) / sqrt(var + eps)` over the channels of a frame, `mish(z) = z tanh(softplus
z)`. A program holds all channels of its frames, so that norm and Mish follow the product where it
lies; a library's product would take three launches and five times the bytes (windows of 3 C values
a frame, then `h`, each written and read again). The weight is read as it lies in a convolution,
channels before taps: nothing derived from it can go stale. (Matcha-TTS's block, arXiv 2309.03199,
made causal.)

The backward recomputes the norm from `h` in one kernel; the convolution's own backward is two
products of the libraries.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from imf_kernels import checks, dispatch
from imf_kernels.ops._dtypes import wide, wide_dtype
from imf_kernels.ops._layout import contiguous
from imf_kernels.ops._mish import mish
from imf_kernels.ops._rows import (
    FRAMES_PER_PROGRAM,
    check_modulation,
    check_rows,
    per_frame,
    row_stride,
    row_sums,
    row_warps,
    selected,
)
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
from imf_kernels.ops.linear import linear
from imf_kernels.rows import Rows

Norm = tuple[Tensor, Tensor]
"""gamma and beta."""


def windows(x: Tensor, rows: Rows, taps: int) -> Tensor:
    """Each frame with those before it in its row, zeros before the first: `(T, C * taps)`."""
    behind = F.pad(x, (0, 0, taps, 0)).unfold(0, taps, 1)[1:]
    return torch.where(_same_row(rows, taps)[:, None], behind, 0.0).flatten(1)


def _same_row(rows: Rows, taps: int) -> Tensor:
    """Whether a tap of a frame reads its row, the own frame last: bool `(T, taps)`."""
    of_tap = F.pad(rows.row_of, (taps, 0), value=-1).unfold(0, taps, 1)[1:]
    of_frame = rows.row_of[:, None]
    return (of_tap == of_frame) & (of_frame >= 0)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    norm: Norm | None,
    shift: Tensor | None,
    residual: Tensor | None,
    rows: Rows,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, the specification: `(y, h)`."""
    h = linear(windows(x, rows, weight.shape[2]), weight.flatten(1), bias)
    h = h if addend is None else h + selected(addend, rows)
    y = h
    if norm is not None:
        gamma, beta = map(wide, norm)
        y = F.mish(F.layer_norm(wide(h), gamma.shape, gamma, beta, eps))
        y = y if shift is None else y + per_frame(wide(shift), rows)
        y = y if residual is None else y + wide(residual)
    return selected(y.to(x.dtype), rows), h


@jit(do_not_specialize=["frames"])
def _forward_kernel(
    p_x,
    p_weight,
    p_bias,
    p_addend,
    p_gamma,
    p_beta,
    p_shift,
    p_residual,
    p_starts,
    p_row_of,
    p_y,
    p_h,
    frames,
    stride_weight,
    stride_addend,
    stride_shift,
    eps,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    KEEP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A block of frames, whatever rows they are of: each reads its own row alone."""
    wait_for_predecessor()
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    o_m = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_frame = first + o_m < frames
    b_row = tl.load(p_row_of + first + o_m, mask=m_frame, other=-1)
    m_row = b_row >= 0
    b_before = (first - tl.load(p_starts + b_row, mask=m_row, other=0)).to(tl.int32) + o_m
    p_x += first * C
    b_h = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    depth = tl.where(tl.max(b_row, 0) < 0, 0, C * TAPS)  # nothing to do for frames of no row
    for k in range(0, depth, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < C * TAPS
        o_back = TAPS - 1 - o_k % TAPS
        m_x = m_row[:, None] & (o_back[None, :] <= b_before[:, None]) & m_k[None, :]
        o_x = (o_m[:, None] - o_back[None, :]) * C + (o_k // TAPS)[None, :]
        b_x = tl.load(p_x + o_x, mask=m_x, other=0.0)
        o_weight = o_d[None, :] * stride_weight + o_k[:, None]
        b_weight = tl.load(p_weight + o_weight, mask=m_d[None, :] & m_k[:, None], other=0.0)
        b_h += dot(b_x, b_weight, ACC)

    m = m_row[:, None] & m_d[None, :]
    m_store = m_frame[:, None] & m_d[None, :]
    o = o_m[:, None] * D + o_d[None, :]
    if HAS_BIAS:
        b_h += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(ACC)[None, :]
    if HAS_ADDEND:
        p_block = p_addend + first * stride_addend
        b_h += tl.load(p_block + o_m[:, None] * stride_addend + o_d[None, :], mask=m, other=0.0).to(
            ACC
        )
    if KEEP:
        b_kept = tl.where(m, b_h, 0.0).to(p_h.dtype.element_ty)
        tl.store(p_h + first * D + o, b_kept, mask=m_store)
    b_y = b_h
    if HAS_NORM:
        b_gamma = tl.load(p_gamma + o_d, mask=m_d, other=0.0).to(ACC)
        b_beta = tl.load(p_beta + o_d, mask=m_d, other=0.0).to(ACC)
        b_h = tl.where(m_d[None, :], b_h - (tl.sum(b_h, 1) / D)[:, None], 0.0)
        b_norm = b_h / tl.sqrt(tl.sum(b_h * b_h, 1) / D + eps)[:, None]
        b_y, _ = mish(b_norm * b_gamma[None, :] + b_beta[None, :])
    if HAS_SHIFT:
        o_shift = (b_row * stride_shift)[:, None] + o_d[None, :]
        b_y += tl.load(p_shift + o_shift, mask=m, other=0.0).to(ACC)
    if HAS_RESIDUAL:
        b_y += tl.load(p_residual + first * D + o, mask=m, other=0.0).to(ACC)
    b_y = tl.where(m, b_y, 0.0).to(p_y.dtype.element_ty)
    tl.store(p_y + first * D + o, b_y, mask=m_store)


@jit
def _norm_backward_kernel(
    p_grad,
    p_h,
    p_gamma,
    p_beta,
    p_starts,
    p_lengths,
    p_grad_h,
    p_partials,
    stride_partials,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    FRAMES: tl.constexpr,
):
    """dh = (g - mean(g) - norm mean(g norm)) / std with g = dz gamma and dz = dy mish'(z).

    Per program one partial sum each for gamma, beta, bias and shift.
    """
    wait_for_predecessor()
    chunk = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    o = tl.arange(0, BLOCK_D)
    m = o < D
    start = tl.load(p_starts + row).to(tl.int64)
    length = tl.load(p_lengths + row)
    b_gamma = tl.load(p_gamma + o, mask=m, other=0.0).to(ACC)
    b_beta = tl.load(p_beta + o, mask=m, other=0.0).to(ACC)
    b_sum_gamma = tl.zeros([BLOCK_D], ACC)
    b_sum_beta = tl.zeros([BLOCK_D], ACC)
    b_sum_bias = tl.zeros([BLOCK_D], ACC)
    b_sum_shift = tl.zeros([BLOCK_D], ACC)
    for i in range(FRAMES):
        frame = chunk * FRAMES + i
        if frame < length:
            o_frame = (start + frame) * D + o
            b_h = tl.load(p_h + o_frame, mask=m, other=0.0).to(ACC)
            b_grad = tl.load(p_grad + o_frame, mask=m, other=0.0).to(ACC)
            b_h = tl.where(m, b_h - tl.sum(b_h, 0) / D, 0.0)
            rstd = 1 / tl.sqrt(tl.sum(b_h * b_h, 0) / D + eps)
            b_norm = b_h * rstd
            _, b_slope = mish(b_norm * b_gamma + b_beta)
            b_grad_z = b_grad * b_slope
            b_g = b_grad_z * b_gamma
            b_grad_h = (b_g - tl.sum(b_g, 0) / D - b_norm * (tl.sum(b_g * b_norm, 0) / D)) * rstd
            b_sum_gamma += b_grad_z * b_norm
            b_sum_beta += b_grad_z
            b_sum_bias += b_grad_h
            b_sum_shift += b_grad
            tl.store(p_grad_h + o_frame, b_grad_h.to(p_grad_h.dtype.element_ty), mask=m)
    p_partial = p_partials + (row * tl.num_programs(0) + chunk) * D + o
    tl.store(p_partial, b_sum_gamma, mask=m)
    tl.store(p_partial + stride_partials, b_sum_beta, mask=m)
    tl.store(p_partial + 2 * stride_partials, b_sum_bias, mask=m)
    tl.store(p_partial + 3 * stride_partials, b_sum_shift, mask=m)


def can_use_kernel(weight: Tensor) -> bool:
    """A program holds all channels of its frames in registers."""
    return weight.shape[0] <= 256


def _blocks(x: Tensor) -> dict[str, int]:
    """Tile sizes and launch options; of the dtype only, hence a row's bits do not depend on others.

    Every program reads the whole weight: 32 frames balance that with their products, and 1,250
    frames still spread over 40 multiprocessors.
    """
    if x.dtype in (torch.bfloat16, torch.float16):
        return {"BLOCK_M": 32, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 16, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}


def _launch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    norm: Norm | None,
    shift: Tensor | None,
    residual: Tensor | None,
    starts: Tensor,
    row_of: Tensor,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """`x` and `residual` contiguous, taps and channels of `weight` too."""
    dim, channels, taps = weight.shape
    y = x.new_empty((x.shape[0], dim))
    h = x.new_empty(y.shape if keep else (0,))
    blocks = _blocks(x)
    launch(
        _forward_kernel,
        (cdiv(x.shape[0], blocks["BLOCK_M"]),),
        x,
        weight,
        bias,
        addend,
        None if norm is None else norm[0],
        None if norm is None else norm[1],
        shift,
        residual,
        starts,
        row_of,
        y,
        h,
        x.shape[0],
        weight.stride(0),
        0 if addend is None else addend.stride(0),
        0 if shift is None else row_stride(shift),
        eps,
        C=channels,
        TAPS=taps,
        D=dim,
        HAS_BIAS=bias is not None,
        HAS_ADDEND=addend is not None,
        HAS_NORM=norm is not None,
        HAS_SHIFT=shift is not None,
        HAS_RESIDUAL=residual is not None,
        KEEP=keep,
        ACC=accumulator(x),
        BLOCK_D=max(next_power_of_2(dim), 16),
        **blocks,
    )
    return y, h


def _launch_norm_backward(
    grad: Tensor, h: Tensor, gamma: Tensor, beta: Tensor, rows: Rows, eps: float
) -> tuple[Tensor, Tensor]:
    """Of h `(T, D)`; of gamma, beta, bias and shift, each row's, wide `(4, R, D)`."""
    dim = h.shape[1]
    count, chunks = rows.lengths.shape[0], cdiv(rows.longest, FRAMES_PER_PROGRAM)
    grad_h = h.new_zeros(h.shape)  # no program comes to the frames of no row
    partials = h.new_empty((4, count, chunks, dim), dtype=wide_dtype(h))
    block = next_power_of_2(dim)
    launch(
        _norm_backward_kernel,
        (chunks, count),
        grad,
        h,
        gamma,
        beta,
        rows.starts,
        rows.lengths,
        grad_h,
        partials,
        partials.stride(0),
        eps,
        D=dim,
        BLOCK_D=block,
        ACC=accumulator(h),
        FRAMES=FRAMES_PER_PROGRAM,
        num_warps=row_warps(block),
    )
    return grad_h, partials.sum(2)


def _reference_norm_backward(
    grad: Tensor, h: Tensor, gamma: Tensor, beta: Tensor, rows: Rows, eps: float
) -> tuple[Tensor, Tensor]:
    dy, centred = wide(selected(grad, rows)), wide(selected(h, rows))
    centred = centred - centred.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    norm = centred * rstd
    z = norm * wide(gamma) + wide(beta)
    tanh = F.softplus(z).tanh()
    dz = dy * (tanh + z * z.sigmoid() * (1 - tanh.square()))
    g = dz * wide(gamma)
    dh = (g - g.mean(-1, keepdim=True) - norm * (g * norm).mean(-1, keepdim=True)) * rstd
    sums = torch.stack([row_sums(part, rows) for part in (dz * norm, dz, dh, dy)])
    return dh.to(h.dtype), sums


@torch.library.custom_op("imf_kernels::causal_conv", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
    row_of: Tensor,
    longest: int,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y, and h with `keep` (else empty)."""
    x, bias, gamma, beta, residual = contiguous(x, bias, gamma, beta, residual)
    norm = None if gamma is None or beta is None else (gamma, beta)
    if dispatch.runs_triton(x):
        weight = weight if weight[0].is_contiguous() else weight.contiguous()
        addend = addend if addend is None or addend.stride(1) == 1 else addend.contiguous()
        around = (bias, addend, norm, shift, residual)
        return _launch_forward(x, weight, *around, starts, row_of, eps, keep)
    rows = Rows(starts, lengths, row_of, longest)
    y, h = reference(x, weight, bias, addend, norm, shift, residual, rows, eps)
    return y, h.clone() if keep else h.new_empty(0)


@_op.register_fake
def _(x, weight, bias, addend, gamma, beta, shift, residual, starts, lengths, row_of, longest, *a):
    y = x.new_empty((x.shape[0], weight.shape[0]))
    return y, x.new_empty(y.shape if a[1] else (0,))


@torch.library.custom_op("imf_kernels::causal_conv_norm_backward", mutates_args=())
def _op_norm_backward(
    grad: Tensor,
    h: Tensor,
    gamma: Tensor,
    beta: Tensor,
    starts: Tensor,
    lengths: Tensor,
    row_of: Tensor,
    longest: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    run = _launch_norm_backward if dispatch.runs_triton(h) else _reference_norm_backward
    rows = Rows(starts, lengths, row_of, longest)
    grad, h, gamma, beta = contiguous(grad, h, gamma, beta)
    return run(grad, h, gamma, beta, rows, eps)


@_op_norm_backward.register_fake
def _(grad, h, gamma, beta, starts, lengths, row_of, longest, eps):
    sums = (4, lengths.shape[0], h.shape[1])
    return h.new_empty(h.shape), h.new_empty(sums, dtype=wide_dtype(h))


def _setup_context(ctx, inputs, output):
    x, weight, bias, addend, gamma, beta, shift, residual, *layout, ctx.longest, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight, gamma, beta, output[1], *layout)
    ctx.mark_non_differentiable(output[1])
    ctx.dtypes = [None if t is None else t.dtype for t in (bias, addend, shift, residual)]
    ctx.shared_shift = shift is not None and shift.shape[0] == 1


def _backward(ctx, grad, _):
    x, weight, gamma, beta, h, starts, lengths, row_of = ctx.saved_tensors
    rows = Rows(starts, lengths, row_of, ctx.longest)
    bias, addend, shift, residual = ctx.dtypes
    grad = selected(grad, rows)
    of_norm: list[Tensor | None] = [None, None]
    if gamma is None:
        grad_h, of_bias, of_shift = grad, wide(grad).sum(0), grad
    else:
        grad_h, sums = _op_norm_backward(grad, h, gamma, beta, *rows, ctx.eps)
        of_gamma, of_beta, of_bias = sums[:3].sum(1)
        of_norm = [of_gamma.to(gamma.dtype), of_beta.to(beta.dtype)]
        of_shift = sums[3].sum(0, keepdim=True) if ctx.shared_shift else sums[3]
    return (
        _grad_x(grad_h, weight, rows) if ctx.needs_input_grad[0] else None,
        (grad_h.t() @ windows(x, rows, weight.shape[2])).view(weight.shape),
        None if bias is None else of_bias.to(bias),
        None if addend is None else grad_h.to(addend),
        *of_norm,
        None if shift is None else of_shift.to(shift),
        None if residual is None else grad.to(residual),
        *[None] * 6,
    )


def _grad_x(grad_h: Tensor, weight: Tensor, rows: Rows) -> Tensor:
    """Every frame gathers from itself and those after it in its row."""
    frames, (_, channels, taps) = len(grad_h), weight.shape
    of_tap = (grad_h @ weight.flatten(1)).view(frames, channels, taps)
    of_tap = torch.where(_same_row(rows, taps)[:, None], of_tap, 0.0)
    grad = wide(grad_h).new_zeros(frames + taps - 1, channels)
    for tap in range(taps):
        grad[tap : tap + frames] += of_tap[:, :, tap]
    return grad[taps - 1 :].to(grad_h.dtype)


_op.register_autograd(_backward, setup_context=_setup_context)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, addend: Tensor | None = None
) -> Tensor:
    """The convolution alone, `conv(x) + bias + addend`.

    The arguments, the gradients and the errors are those of `causal_conv_norm`.
    """
    return _run(x, weight, bias, addend, None, None, None, rows, 0.0)


def causal_conv_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    rows: Rows,
    *,
    addend: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`mish(norm(conv(x) + bias + addend) * gamma + beta) + shift + residual`.

    Args:
        x: `(T, C)`, floating: the frames of a batch.
        weight: Of a convolution, `(D, C, taps)`, in the dtype of `x`; a slice of its channels is
            read in place.
        bias: `(D,)`, in the dtype of `x`, or None.
        gamma, beta: `(D,)`, floating.
        rows: Where the rows lie among the T frames. Before a row's first frame lie zeros; frames
            of no row are never read and give 0.
        addend: `(T, D)`, floating: the share of other channels, for example.
        shift: `(R, D)`, or `(1, D)` for all rows; any row stride, unit stride along D.
        residual: `(T, D)`, floating.
        eps: Added to the variance.

    Returns:
        `(T, D)` in the dtype of `x`; all but the operands of the product is float32. Under autocast
        x, weight and bias are cast, as for any product.

    Gradients pass to all tensors, deterministically.

    Raises:
        ValueError, TypeError: naming the argument, the expected and the given value.
    """
    return _run(x, weight, bias, addend, (gamma, beta), shift, residual, rows, eps)


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    norm: Norm | None,
    shift: Tensor | None,
    residual: Tensor | None,
    rows: Rows,
    eps: float,
) -> Tensor:
    checks.shape("x", x, "T", "C")
    checks.shape("weight", weight, "D", x.shape[1], "taps")
    frames, dim = x.shape[0], weight.shape[0]
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    checks.floating("x", x)
    check_rows(rows, x)
    gamma, beta = norm if norm is not None else (None, None)
    channels = {"bias": bias, "gamma": gamma, "beta": beta}
    for name, tensor in (channels | {"addend": addend, "residual": residual}).items():
        if tensor is not None:
            checks.shape(name, tensor, *((dim,) if name in channels else (frames, dim)))
            checks.floating(name, tensor)
            checks.same_device(name, tensor, x.device)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            checks.dtype(name, tensor, x.dtype)
    checks.same_device("weight", weight, x.device)
    if shift is not None:
        check_modulation("shift", shift, weight[:, 0].t(), rows)
    others = (weight, bias, addend, gamma, beta, shift, residual)
    if not (can_use_kernel(weight) and dispatch.use_kernel(x, *others)):
        return reference(x, weight, bias, addend, norm, shift, residual, rows, eps)[0]
    keep = (
        norm is not None
        and torch.is_grad_enabled()
        and any(tensor is not None and tensor.requires_grad for tensor in (x, *others))
    )
    return _op(x, weight, bias, addend, gamma, beta, shift, residual, *rows, eps, keep)[0]
