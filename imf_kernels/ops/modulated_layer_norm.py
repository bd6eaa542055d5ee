"""The residual stream of an adaLN block, one pass between two matrix products:

    x' = x + gate * h                          the gated residual of the branch before
    y  = norm(x') * (1 + scale) + shift        what the next branch reads

`norm(x) = (x - mean) / sqrt(var + eps)` over the D channels of a frame, without affine. `gate`,
`scale` and `shift` are one row of modulation per row of the batch, or one for all: strided views of
`(R, 6, D)` or of a step table, read in place. The first branch of a model has no residual before
it. A plain transformer's block is the same without a gate, its `scale` being the gain itself
(`affine`). For branches that multiply in FP8, `..._fp8` give y as `quantize_rows` would, in the
same pass. (DiT, arXiv 2212.09748, adaLN-Zero.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from imf_kernels import checks, dispatch
from imf_kernels.ops._dtypes import wide, wide_dtype
from imf_kernels.ops._layout import contiguous
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
    jit,
    launch,
    next_power_of_2,
    tl,
    wait_for_predecessor,
)
from imf_kernels.ops.quantize_rows import (
    Quantized,
    check_no_gradient,
    empty,
    runs_triton,
    store_quantized,
)
from imf_kernels.ops.quantize_rows import reference as quantized
from imf_kernels.rows import Rows


def reference(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    rows: Rows | None,
    eps: float,
    affine: bool = False,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, the specification: `(x', y)`."""
    x, y = _wide_reference(x, h, gate, shift, scale, rows, eps, affine)
    return x, y.to(x.dtype)


def reference_fp8(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    rows: Rows | None,
    eps: float,
) -> tuple[Tensor, Quantized]:
    """The same with y in FP8, which is not rounded before."""
    x, y = _wide_reference(x, h, gate, shift, scale, rows, eps)
    return x, quantized(y, gelu=False)


def _wide_reference(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    rows: Rows | None,
    eps: float,
    affine: bool = False,
) -> tuple[Tensor, Tensor]:
    """x' in its dtype, y before it is rounded."""
    x = selected(x, rows)
    if h is not None:
        branch = wide(selected(h, rows))
        branch = branch if gate is None else per_frame(wide(gate), rows) * branch
        x = (wide(x) + branch).to(x.dtype)
    if affine:
        y = F.layer_norm(wide(x), x.shape[-1:], wide(scale[0]), wide(shift[0]), eps)
        return x, selected(y, rows)
    norm = F.layer_norm(wide(x), x.shape[-1:], eps=eps)
    y = norm * (1 + per_frame(wide(scale), rows)) + per_frame(wide(shift), rows)
    return x, selected(y, rows)


@jit
def _forward_kernel(
    p_x,
    p_h,
    p_gate,
    p_shift,
    p_scale,
    p_row_of,
    p_x_out,
    p_y,
    p_y_scale,
    stride_gate,
    stride_shift,
    stride_scale,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    AFFINE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    ACC: tl.constexpr,
):
    wait_for_predecessor()
    frame = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK_D)
    m = o < D
    o_frame = frame * D + o
    row = tl.zeros([], tl.int64)
    if HAS_ROWS:
        row = tl.load(p_row_of + frame).to(tl.int64)
        if row < 0:  # a frame of no row
            b_zero = tl.zeros([BLOCK_D], tl.float32)
            if QUANTIZE:
                store_quantized(p_y + o_frame, p_y_scale + frame, b_zero, m)
            else:
                tl.store(p_y + o_frame, b_zero.to(p_y.dtype.element_ty), mask=m)
            if RESIDUAL:
                tl.store(p_x_out + o_frame, b_zero.to(p_x_out.dtype.element_ty), mask=m)
            return
    b_x = tl.load(p_x + o_frame, mask=m, other=0.0).to(ACC)
    if RESIDUAL:
        b_h = tl.load(p_h + o_frame, mask=m, other=0.0).to(ACC)
        if GATED:
            b_h *= tl.load(p_gate + row * stride_gate + o, mask=m, other=0.0).to(ACC)
        b_out = (b_x + b_h).to(p_x_out.dtype.element_ty)
        tl.store(p_x_out + o_frame, b_out, mask=m)
        b_x = b_out.to(ACC)  # as the backward will read it
    b_x = tl.where(m, b_x - tl.sum(b_x, 0) / D, 0.0)
    b_norm = b_x / tl.sqrt(tl.sum(b_x * b_x, 0) / D + eps)
    b_shift = tl.load(p_shift + row * stride_shift + o, mask=m, other=0.0).to(ACC)
    b_gain = tl.load(p_scale + row * stride_scale + o, mask=m, other=0.0).to(ACC)
    if not AFFINE:
        b_gain += 1
    b_y = b_norm * b_gain + b_shift
    if QUANTIZE:
        store_quantized(p_y + o_frame, p_y_scale + frame, b_y.to(tl.float32), m)
    else:
        tl.store(p_y + o_frame, b_y.to(p_y.dtype.element_ty), mask=m)


@jit(do_not_specialize=["frames"])
def _backward_kernel(
    p_grad_out,
    p_grad_y,
    p_x,
    p_h,
    p_gate,
    p_scale,
    p_starts,
    p_lengths,
    p_grad_x,
    p_grad_h,
    p_partials,
    frames,
    stride_gate,
    stride_scale,
    stride_partials,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    AFFINE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    ACC: tl.constexpr,
    FRAMES: tl.constexpr,
):
    """`x` is the residual's result; its statistics are recomputed.

    dx' = grad_out + (g - mean(g) - norm * mean(g * norm)) / std with g = dy * gain

    Per program one partial sum each for the shift, the scale and the gate.
    """
    wait_for_predecessor()
    chunk = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    o = tl.arange(0, BLOCK_D)
    m = o < D
    start = tl.zeros([], tl.int64)
    if HAS_ROWS:
        start = tl.load(p_starts + row).to(tl.int64)
        frames = tl.load(p_lengths + row)
    b_gain = tl.load(p_scale + row * stride_scale + o, mask=m, other=0.0).to(ACC)
    if not AFFINE:
        b_gain += 1
    b_sum_shift = tl.zeros([BLOCK_D], ACC)
    b_sum_scale = tl.zeros([BLOCK_D], ACC)
    if GATED:
        b_gate = tl.load(p_gate + row * stride_gate + o, mask=m, other=0.0).to(ACC)
        b_sum_gate = tl.zeros([BLOCK_D], ACC)
    for i in range(FRAMES):
        frame = chunk * FRAMES + i
        if frame < frames:
            o_frame = (start + frame) * D + o
            b_x = tl.load(p_x + o_frame, mask=m, other=0.0).to(ACC)
            b_grad = tl.load(p_grad_y + o_frame, mask=m, other=0.0).to(ACC)
            b_x = tl.where(m, b_x - tl.sum(b_x, 0) / D, 0.0)
            rstd = 1 / tl.sqrt(tl.sum(b_x * b_x, 0) / D + eps)
            b_norm = b_x * rstd
            b_g = b_grad * b_gain
            b_grad_x = (b_g - tl.sum(b_g, 0) / D - b_norm * (tl.sum(b_g * b_norm, 0) / D)) * rstd
            b_sum_shift += b_grad
            b_sum_scale += b_grad * b_norm
            if RESIDUAL:
                b_grad_x += tl.load(p_grad_out + o_frame, mask=m, other=0.0).to(ACC)
            if GATED:
                b_h = tl.load(p_h + o_frame, mask=m, other=0.0).to(ACC)
                b_sum_gate += b_grad_x * b_h
                b_grad_h = b_grad_x * b_gate
                tl.store(p_grad_h + o_frame, b_grad_h.to(p_grad_h.dtype.element_ty), mask=m)
            tl.store(p_grad_x + o_frame, b_grad_x.to(p_grad_x.dtype.element_ty), mask=m)
    p_partial = p_partials + (row * tl.num_programs(0) + chunk) * D + o
    tl.store(p_partial, b_sum_shift, mask=m)
    tl.store(p_partial + stride_partials, b_sum_scale, mask=m)
    if GATED:
        tl.store(p_partial + 2 * stride_partials, b_sum_gate, mask=m)


def _launch_forward(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    row_of: Tensor | None,
    eps: float,
    affine: bool = False,
    quantize: bool = False,
) -> tuple[Tensor, Tensor, Any]:
    """x' (empty without `h`), y, and y's scale if it is quantised, else None."""
    frames, dim = x.shape
    x_out = x.new_empty(x.shape if h is not None else (0,))
    y, y_scale = empty(x) if quantize else (x.new_empty(x.shape), None)
    block = next_power_of_2(dim)
    launch(
        _forward_kernel,
        (frames,),
        x,
        h,
        gate,
        shift,
        scale,
        row_of,
        x_out,
        y,
        y_scale,
        0 if gate is None else row_stride(gate),
        row_stride(shift),
        row_stride(scale),
        eps,
        D=dim,
        BLOCK_D=block,
        RESIDUAL=h is not None,
        GATED=gate is not None,
        AFFINE=affine,
        HAS_ROWS=row_of is not None,
        QUANTIZE=quantize,
        ACC=accumulator(x),
        num_warps=row_warps(block),
    )
    return x_out, y, y_scale


Gradients = tuple[Tensor, Tensor, Tensor]
"""Of x `(T, D)`; of h, empty without a gate; of shift, scale and gate, wide `(2 or 3, R, D)`."""


def _launch_backward(
    grad_out: Tensor,
    grad_y: Tensor,
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    rows: Rows | None,
    eps: float,
    affine: bool = False,
) -> Gradients:
    frames, dim = x.shape
    count, longest = (1, frames) if rows is None else (rows.lengths.shape[0], rows.longest)
    chunks = cdiv(longest, FRAMES_PER_PROGRAM)
    # no program comes to the frames of no row
    fill = torch.empty if rows is None else torch.zeros
    grad_x = fill(x.shape, dtype=x.dtype, device=x.device)
    grad_h = x.new_empty(0)
    if h is not None and gate is not None:
        grad_h = fill(x.shape, dtype=h.dtype, device=x.device)
    parts = 2 if gate is None else 3
    partials = x.new_empty((parts, count, chunks, dim), dtype=wide_dtype(x))
    block = next_power_of_2(dim)
    launch(
        _backward_kernel,
        (chunks, count),
        grad_out,
        grad_y,
        x,
        h,
        gate,
        scale,
        None if rows is None else rows.starts,
        None if rows is None else rows.lengths,
        grad_x,
        grad_h,
        partials,
        frames,
        0 if gate is None else row_stride(gate),
        row_stride(scale),
        partials.stride(0),
        eps,
        D=dim,
        BLOCK_D=block,
        RESIDUAL=h is not None,
        GATED=gate is not None,
        AFFINE=affine,
        HAS_ROWS=rows is not None,
        ACC=accumulator(x),
        FRAMES=FRAMES_PER_PROGRAM,
        num_warps=row_warps(block),
    )
    return grad_x, grad_h, partials.sum(2)


def _reference_backward(
    grad_out: Tensor,
    grad_y: Tensor,
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    rows: Rows | None,
    eps: float,
    affine: bool = False,
) -> Gradients:
    dy = wide(selected(grad_y, rows))
    centred = wide(x) - wide(x).mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    norm = centred * rstd
    g = dy * (per_frame(wide(scale), rows) + (0 if affine else 1))
    grad_x = (g - g.mean(-1, keepdim=True) - norm * (g * norm).mean(-1, keepdim=True)) * rstd
    products = [dy, dy * norm]
    grad_h = x.new_empty(0)
    if h is not None:
        grad_x = grad_x + wide(grad_out)
        if gate is not None:
            products.append(grad_x * wide(h))
            grad_h = selected((grad_x * per_frame(wide(gate), rows)).to(h.dtype), rows)
    sums = torch.stack([row_sums(product, rows) for product in products])
    return selected(grad_x.to(x.dtype), rows), grad_h, sums


def _layout(*parts: Any) -> Rows | None:
    return None if parts[0] is None else Rows(*parts)


@torch.library.custom_op("imf_kernels::modulated_layer_norm", mutates_args=())
def _op(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    row_of: Tensor | None,
    longest: int,
    eps: float,
    affine: bool,
) -> tuple[Tensor, Tensor]:
    """x' (empty without `h`) and y."""
    x, h = contiguous(x, h)
    if dispatch.runs_triton(x):
        return _launch_forward(x, h, gate, shift, scale, row_of, eps, affine)[:2]
    if not affine and _has_cpp(x, h, gate, shift, scale):
        return torch.ops.imf_kernels.modulated_layer_norm_cpu(x, h, gate, shift, scale, row_of, eps)
    rows = _layout(starts, lengths, row_of, longest)
    x_out, y = reference(x, h, gate, shift, scale, rows, eps, affine)
    return x.new_empty(0) if h is None else x_out, y


@_op.register_fake
def _(x, h, gate, shift, scale, starts, lengths, row_of, longest, eps, affine):
    return x.new_empty(x.shape if h is not None else (0,)), x.new_empty(x.shape)


@torch.library.custom_op("imf_kernels::modulated_layer_norm_backward", mutates_args=())
def _op_backward(
    grad_out: Tensor,
    grad_y: Tensor,
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    row_of: Tensor | None,
    longest: int,
    eps: float,
    affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, grad_y, x, h = contiguous(grad_out, grad_y, x, h)
    if not affine and _has_cpp(x, h, gate, scale) and not dispatch.runs_triton(x):
        return torch.ops.imf_kernels.modulated_layer_norm_backward_cpu(
            grad_out, grad_y, x, h, gate, scale, starts, lengths, eps
        )
    rows = _layout(starts, lengths, row_of, longest)
    run = _launch_backward if dispatch.runs_triton(x) else _reference_backward
    return run(grad_out, grad_y, x, h, gate, scale, rows, eps, affine)


@_op_backward.register_fake
def _(grad_out, grad_y, x, h, gate, scale, starts, lengths, row_of, longest, eps, affine):
    count = 1 if lengths is None else lengths.shape[0]
    sums = x.new_empty((2 if gate is None else 3, count, x.shape[1]), dtype=wide_dtype(x))
    grad_h = x.new_empty(0) if h is None or gate is None else h.new_empty(h.shape)
    return x.new_empty(x.shape), grad_h, sums


def _has_cpp(*tensors: Tensor | None) -> bool:
    return dispatch.HAS_EXTENSION and all(
        tensor is None or tensor.dtype == torch.float32 for tensor in tensors
    )


def _setup_context(ctx, inputs, output):
    x, h, gate, shift, scale, starts, lengths, row_of, *ctx.constants = inputs
    ctx.save_for_backward(x if h is None else output[0], h, gate, scale, starts, lengths, row_of)
    ctx.shift = shift.dtype, shift.shape[0]


def _backward(ctx, grad_out, grad_y):
    saved = ctx.saved_tensors  # once: checkpointing recomputes at every access
    _, h, gate, scale, *_ = saved
    grad_x, grad_h, sums = _op_backward(grad_out, grad_y, *saved, *ctx.constants)
    grad_shift, grad_scale, *grad_gate = sums

    def shared(grad, dtype, rows):
        return (grad if len(grad) == rows else grad.sum(0, keepdim=True)).to(dtype)

    return (
        grad_x,
        None if h is None else grad_x.to(h.dtype) if gate is None else grad_h,
        None if gate is None else shared(grad_gate[0], gate.dtype, len(gate)),
        shared(grad_shift, *ctx.shift),
        shared(grad_scale, scale.dtype, len(scale)),
        *[None] * 6,
    )


_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("imf_kernels::modulated_layer_norm_fp8", mutates_args=())
def _op_fp8(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    row_of: Tensor | None,
    longest: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x' (empty without `h`), y and its scale."""
    x, h = contiguous(x, h)
    if runs_triton(x):
        return _launch_forward(x, h, gate, shift, scale, row_of, eps, quantize=True)
    rows = _layout(starts, lengths, row_of, longest)
    x_out, y = reference_fp8(x, h, gate, shift, scale, rows, eps)
    return x.new_empty(0) if h is None else x_out, *y


@_op_fp8.register_fake
def _(x, h, gate, shift, scale, starts, lengths, row_of, longest, eps):
    return x.new_empty(x.shape if h is not None else (0,)), *empty(x)


def modulated_layer_norm(
    x: Tensor, shift: Tensor, scale: Tensor, rows: Rows | None = None, eps: float = 1e-6
) -> Tensor:
    """`norm(x) * (1 + scale) + shift`, computed in float32, returned in `x`'s dtype.

    Args:
        x: `(T, D)`, floating: the frames of a batch.
        shift, scale: `(R, D)`, or `(1, D)` for all rows; any row stride, unit stride along D.
        rows: Where the R rows lie among the T frames; frames of no row give 0. None: all frames
            are one row.
        eps: Added to the variance.

    Gradients pass to all three tensors, deterministically.

    Raises:
        ValueError, TypeError: naming the argument, the expected and the given value.
    """
    return _run(x, None, None, shift, scale, rows, eps)[1]


def gated_residual_norm(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    rows: Rows | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`x' = x + gate * h` and `modulated_layer_norm(x', shift, scale)`, in one pass.

    Args:
        x: Residual stream `(T, D)`, floating.
        h: Branch output `(T, D)`, floating (under autocast it may differ from `x`).
        gate: As `shift` and `scale`.

    The other arguments, the gradients (to all five tensors) and the errors are those of
    `modulated_layer_norm`. x' is rounded to `x`'s dtype before it is normalised.

    Returns:
        `(x', y)`, both `(T, D)` in `x`'s dtype.
    """
    return _run(x, h, gate, shift, scale, rows, eps)


def residual_layer_norm(
    x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """`x' = x + h` and `norm(x') * weight + bias`, in one pass.

    Args:
        x, h: As in `gated_residual_norm`; of each frame alone, hence without rows.
        weight, bias: `(D,)`, floating.

    The rest is as in `gated_residual_norm`.
    """
    checks.shape("weight", weight, x.shape[-1])
    checks.shape("bias", bias, x.shape[-1])
    return _run(x, h, None, bias[None], weight[None], None, eps, affine=True)


def modulated_layer_norm_fp8(
    x: Tensor, shift: Tensor, scale: Tensor, rows: Rows | None = None, eps: float = 1e-6
) -> Quantized:
    """`quantize_rows(modulated_layer_norm(...))` in one pass, of y as it is before rounding.

    The arguments are those of `modulated_layer_norm`, without gradients.
    """
    return _run_fp8(x, None, None, shift, scale, rows, eps)[1]


def gated_residual_norm_fp8(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    rows: Rows | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Quantized]:
    """`gated_residual_norm` with y in FP8, quantised as it is before rounding.

    The arguments are those of `gated_residual_norm`, without gradients.
    """
    return _run_fp8(x, h, gate, shift, scale, rows, eps)


def _run(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    rows: Rows | None,
    eps: float,
    affine: bool = False,
) -> tuple[Tensor, Tensor]:
    _check(x, h, gate, shift, scale, rows)
    cpp = not affine and all(
        a is None or a.dtype == torch.float32 for a in (x, h, gate, shift, scale)
    )
    if not dispatch.use_kernel(x, h, gate, shift, scale, cpp=cpp):
        return reference(x, h, gate, shift, scale, rows, eps, affine)
    layout = (None, None, None, 0) if rows is None else rows
    return _op(x, h, gate, shift, scale, *layout, eps, affine)


def _run_fp8(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    rows: Rows | None,
    eps: float,
) -> tuple[Tensor, Quantized]:
    _check(x, h, gate, shift, scale, rows)
    check_no_gradient(x=x, h=h, gate=gate, shift=shift, scale=scale)
    if not dispatch.use_kernel(x, h, gate, shift, scale):
        return reference_fp8(x, h, gate, shift, scale, rows, eps)
    layout = (None, None, None, 0) if rows is None else rows
    x_out, *y = _op_fp8(x, h, gate, shift, scale, *layout, eps)
    return x_out, Quantized(*y)


def _check(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    rows: Rows | None,
) -> None:
    checks.shape("x", x, "T", "D")
    checks.floating("x", x)
    if h is not None:
        checks.shape("h", h, *x.shape)
        checks.floating("h", h)
        checks.same_device("h", h, x.device)
    if rows is not None:
        check_rows(rows, x)
    for name, modulation in (("gate", gate), ("shift", shift), ("scale", scale)):
        if modulation is not None:
            check_modulation(name, modulation, x, rows)
