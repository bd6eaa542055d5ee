"""Rotary positions on packed q, k, v, after an optional RMSNorm of each head of q and k.

    (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin)        interleaved pairs of the first heads

The angle of a frame is its position within its row times the pair's frequency, read from a float32
table. (RoFormer, arXiv 2104.09864; F5-TTS v0 and CosyVoice3 rotate the first head only.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from imf_kernels import checks, dispatch
from imf_kernels.ops._dtypes import wide, wide_dtype
from imf_kernels.ops._layout import contiguous
from imf_kernels.ops._rows import check_rows
from imf_kernels.ops._triton import (
    accumulator,
    jit,
    launch,
    next_power_of_2,
    tl,
    wait_for_predecessor,
)
from imf_kernels.rows import Rows


def reference(
    qkv: Tensor,
    rope: Tensor,
    rows: Rows,
    heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> Tensor:
    """Plain PyTorch, the specification."""
    q, k, v = qkv.unbind(1)
    row = rows.row_of.clamp(min=0)
    frame = torch.arange(qkv.shape[0], device=qkv.device)
    inside = (rows.row_of >= 0)[:, None, None]
    position = torch.where(rows.row_of >= 0, frame - rows.starts[row], 0)
    cos, sin = rope[position][:, None].chunk(2, dim=-1)

    def turned(x: Tensor, weight: Tensor | None) -> Tensor:
        y = wide(x)
        if weight is not None:
            y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() * wide(weight)
        even, odd = y[:, :heads].unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
        y = torch.cat([pairs.flatten(-2), y[:, heads:]], dim=1)
        return torch.where(inside, y.to(x.dtype), x)

    return torch.stack([turned(q, q_weight), turned(k, k_weight), v], dim=1)


@jit
def _forward_kernel(
    p_qkv,
    p_rope,
    p_starts,
    p_row_of,
    p_q_weight,
    p_k_weight,
    p_out,
    stride_frame,
    stride_section,
    out_frame,
    out_section,
    eps,
    HEADS: tl.constexpr,
    ROPE_HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DH: tl.constexpr,
    NORM: tl.constexpr,
    INVERSE: tl.constexpr,
    ACC: tl.constexpr,
):
    """One frame's q, k or v. In place, the launch leaves v and the heads that stay alone."""
    wait_for_predecessor()
    frame = tl.program_id(0).to(tl.int64)
    section = tl.program_id(1)
    o_head = tl.arange(0, BLOCK_H)[:, None]
    o = o_head * DH + tl.arange(0, DH)[None, :]
    m = (o_head < HEADS) & (tl.arange(0, DH)[None, :] < DH)
    row = tl.load(p_row_of + frame)
    b = tl.load(p_qkv + frame * stride_frame + section * stride_section + o, mask=m, other=0.0)
    p_store = p_out + frame * out_frame + section * out_section + o
    if (row < 0) | (section == 2):
        tl.store(p_store, b, mask=m)
    else:
        b_x = b.to(ACC)
        if NORM:
            p_weight = p_k_weight if section == 1 else p_q_weight
            b_weight = tl.load(p_weight + tl.arange(0, DH)).to(ACC)
            b_x = b_x / tl.sqrt(tl.sum(b_x * b_x, 1) / DH + eps)[:, None] * b_weight[None, :]
        p_angle = p_rope + (frame - tl.load(p_starts + row)) * DH + tl.arange(0, DH // 2)
        turns = o_head < ROPE_HEADS
        b_cos = tl.where(turns, tl.load(p_angle)[None, :], 1.0)
        b_sin = tl.where(turns, tl.load(p_angle + DH // 2)[None, :], 0.0)
        if INVERSE:
            b_sin = -b_sin
        b_even, b_odd = tl.split(tl.reshape(b_x, [BLOCK_H, DH // 2, 2]))
        b_even, b_odd = b_even * b_cos - b_odd * b_sin, b_odd * b_cos + b_even * b_sin
        b_x = tl.reshape(tl.join(b_even, b_odd), [BLOCK_H, DH])
        tl.store(p_store, b_x.to(p_out.dtype.element_ty), mask=m)


@jit
def _norm_backward_kernel(
    p_grad,
    p_qkv,
    p_row_of,
    p_q_weight,
    p_k_weight,
    p_grad_qkv,
    p_partials,
    stride_frame,
    stride_section,
    eps,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DH: tl.constexpr,
    ACC: tl.constexpr,
):
    """Through the RMSNorm of one frame's q or k; `grad` is already turned back.

    dx = (g - n mean(g n)) / rms with n = x / rms and g = grad * weight
    """
    wait_for_predecessor()
    frame = tl.program_id(0).to(tl.int64)
    section = tl.program_id(1)
    o_head = tl.arange(0, BLOCK_H)[:, None]
    o = o_head * DH + tl.arange(0, DH)[None, :]
    m = o_head < HEADS
    o_grad = (frame * 3 + section) * HEADS * DH + o
    p_partial = p_partials + (frame * 2 + section) * DH + tl.arange(0, DH)
    b_grad = tl.load(p_grad + o_grad, mask=m, other=0.0)
    if tl.load(p_row_of + frame) < 0:
        tl.store(p_grad_qkv + o_grad, b_grad, mask=m)
        tl.store(p_partial, tl.zeros([DH], ACC))
    else:
        b_g = b_grad.to(ACC)
        p_x = p_qkv + frame * stride_frame + section * stride_section + o
        b_x = tl.load(p_x, mask=m, other=0.0).to(ACC)
        p_weight = p_k_weight if section == 1 else p_q_weight
        b_weight = tl.load(p_weight + tl.arange(0, DH)).to(ACC)
        b_rms = tl.sqrt(tl.sum(b_x * b_x, 1) / DH + eps)[:, None]
        b_norm = b_x / b_rms
        tl.store(p_partial, tl.sum(b_g * b_norm, 0))
        b_g = b_g * b_weight[None, :]
        b_g = (b_g - b_norm * (tl.sum(b_g * b_norm, 1) / DH)[:, None]) / b_rms
        tl.store(p_grad_qkv + o_grad, b_g.to(p_grad_qkv.dtype.element_ty), mask=m)


def can_use_kernel(qkv: Tensor) -> bool:
    """Heads are tiles of the kernels: their width is a power of two."""
    width = qkv.shape[3]
    return width >= 2 and width == next_power_of_2(width)


def _launch(
    qkv: Tensor,
    rope: Tensor,
    starts: Tensor,
    row_of: Tensor,
    heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    out: Tensor,
    inverse: bool = False,
) -> None:
    """Into `out`, which may be `qkv` itself: what stays as it is is then not touched."""
    frames, _, count, width = qkv.shape
    in_place = out is qkv
    touched = heads if in_place and q_weight is None else count
    launch(
        _forward_kernel,
        (frames, 2 if in_place else 3),
        qkv,
        rope,
        starts,
        row_of,
        q_weight,
        k_weight,
        out,
        qkv.stride(0),
        qkv.stride(1),
        out.stride(0),
        out.stride(1),
        eps,
        HEADS=touched,
        ROPE_HEADS=heads,
        BLOCK_H=next_power_of_2(touched),
        DH=width,
        NORM=q_weight is not None,
        INVERSE=inverse,
        ACC=accumulator(qkv),
        num_warps=4 if touched * width >= 512 else 1,
    )


def _launch_norm_backward(
    grad: Tensor, qkv: Tensor, row_of: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """In place on `grad` (contiguous); also the weights' gradients, wide `(2, head_dim)`."""
    frames, _, count, width = qkv.shape
    partials = qkv.new_empty((frames, 2, width), dtype=wide_dtype(qkv))
    launch(
        _norm_backward_kernel,
        (frames, 2),
        grad,
        qkv,
        row_of,
        q_weight,
        k_weight,
        grad,
        partials,
        qkv.stride(0),
        qkv.stride(1),
        eps,
        HEADS=count,
        BLOCK_H=next_power_of_2(count),
        DH=width,
        ACC=accumulator(qkv),
        num_warps=4,
    )
    return grad, partials.sum(0)


def _dense_heads(qkv: Tensor) -> Tensor:
    """Frames and sections lie anywhere, the heads of one side by side."""
    width = qkv.shape[3]
    dense = qkv.stride(3) == 1 and (qkv.stride(2) == width or qkv.shape[2] == 1)
    return qkv if dense else qkv.contiguous()


def _has_cpp(qkv: Tensor, q_weight: Tensor | None) -> bool:
    return dispatch.HAS_EXTENSION and qkv.dtype == torch.float32 and q_weight is None


@torch.library.custom_op("imf_kernels::rope_qkv", mutates_args=())
def _op(
    qkv: Tensor,
    rope: Tensor,
    starts: Tensor,
    lengths: Tensor,
    row_of: Tensor,
    longest: int,
    heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> Tensor:
    if dispatch.runs_triton(qkv):
        out = qkv.new_empty(qkv.shape)
        _launch(_dense_heads(qkv), rope, starts, row_of, heads, q_weight, k_weight, eps, out)
        return out
    if _has_cpp(qkv, q_weight):
        out = qkv.clone(memory_format=torch.contiguous_format)
        torch.ops.imf_kernels.rope_qkv_cpu_(out, rope, starts, row_of, heads)
        return out
    return reference(
        qkv, rope, Rows(starts, lengths, row_of, longest), heads, q_weight, k_weight, eps
    )


@_op.register_fake
def _(qkv, rope, starts, lengths, row_of, longest, heads, q_weight, k_weight, eps):
    return qkv.new_empty(qkv.shape)


@torch.library.custom_op("imf_kernels::rope_qkv_", mutates_args=("qkv",))
def _op_in_place(
    qkv: Tensor,
    rope: Tensor,
    starts: Tensor,
    lengths: Tensor,
    row_of: Tensor,
    longest: int,
    heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> None:
    if dispatch.runs_triton(qkv):
        _launch(qkv, rope, starts, row_of, heads, q_weight, k_weight, eps, qkv)
    elif _has_cpp(qkv, q_weight):
        torch.ops.imf_kernels.rope_qkv_cpu_(qkv, rope, starts, row_of, heads)
    else:
        rows = Rows(starts, lengths, row_of, longest)
        qkv.copy_(reference(qkv, rope, rows, heads, q_weight, k_weight, eps))


@_op_in_place.register_fake
def _(qkv, rope, starts, lengths, row_of, longest, heads, q_weight, k_weight, eps):
    return None


@torch.library.custom_op("imf_kernels::rope_qkv_backward", mutates_args=())
def _op_backward(
    grad: Tensor,
    qkv: Tensor | None,
    rope: Tensor,
    starts: Tensor,
    row_of: Tensor,
    heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Of qkv, and of the two weights, wide `(2, head_dim)` (empty without them)."""
    no_weights = grad.new_empty(0, dtype=wide_dtype(grad))
    if dispatch.runs_triton(grad):
        back = grad.new_empty(grad.shape)
        grad = _dense_heads(grad)
        _launch(grad, rope, starts, row_of, heads, None, None, eps, back, inverse=True)
        if q_weight is None or qkv is None or k_weight is None:
            return back, no_weights
        return _launch_norm_backward(back, _dense_heads(qkv), row_of, q_weight, k_weight, eps)
    cos, sin = rope.chunk(2, dim=-1)
    inverse = torch.cat([cos, -sin], dim=-1)
    if _has_cpp(grad, None):
        back = grad.clone(memory_format=torch.contiguous_format)
        torch.ops.imf_kernels.rope_qkv_cpu_(back, inverse, starts, row_of, heads)
    else:
        rows = Rows(starts, starts[1:], row_of, 0)  # only starts and row_of are read
        back = reference(grad, inverse, rows, heads, None, None, eps)
    if q_weight is None or qkv is None or k_weight is None:
        return back, no_weights
    weights = torch.stack([wide(q_weight), wide(k_weight)])[:, None]
    x, g = wide(qkv[:, :2]), wide(back[:, :2])
    rms = (x.square().mean(-1, keepdim=True) + eps).sqrt()
    norm = x / rms
    inside = (row_of >= 0)[:, None, None, None]
    sums = (g * norm).masked_fill(~inside, 0.0).sum((0, 2))
    g = g * weights
    g = (g - norm * (g * norm).mean(-1, keepdim=True)) / rms
    back[:, :2] = torch.where(inside, g.to(back.dtype), back[:, :2])
    return back, sums


@_op_backward.register_fake
def _(grad, qkv, rope, starts, row_of, heads, q_weight, k_weight, eps):
    shape = (0,) if q_weight is None else (2, grad.shape[3])
    return grad.new_empty(grad.shape), grad.new_empty(shape, dtype=wide_dtype(grad))


def _setup_context(ctx, inputs, output):
    qkv, rope, starts, _, row_of, _, ctx.heads, q_weight, k_weight, ctx.eps = inputs
    saved = None if q_weight is None else qkv
    ctx.save_for_backward(saved, rope, starts, row_of, q_weight, k_weight)


def _backward(ctx, grad):
    qkv, rope, starts, row_of, q_weight, k_weight = ctx.saved_tensors
    grad, weights = _op_backward(
        grad, qkv, rope, starts, row_of, ctx.heads, q_weight, k_weight, ctx.eps
    )
    if q_weight is None:
        return grad, *[None] * 9
    of_q, of_k = weights.to(q_weight.dtype)
    return grad, *[None] * 6, of_q, of_k, None


_op.register_autograd(_backward, setup_context=_setup_context)


def rope_qkv(
    qkv: Tensor,
    rope: Tensor,
    rows: Rows,
    heads: int | None = None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    in_place: bool = False,
) -> Tensor:
    """Rotate the first `heads` heads of q and k by their frames' positions.

    Args:
        qkv: `(T, 3, H, head_dim)`, floating.
        rope: Float32 `(P, head_dim)`: cosines, then sines, of the positions 0 to P - 1, P no less
            than `rows.longest`.
        rows: Where the rows lie among the T frames. Frames of no row stay as they are.
        heads: How many heads, from the first; None: all.
        q_weight, k_weight: `(head_dim,)`; given, all heads of q and k pass an RMSNorm with them
            first.
        eps: Added to the mean square.
        in_place: Overwrite `qkv`, which must not require a gradient; v and the heads that are not
            rotated are then not touched.

    Gradients pass to `qkv` and to the weights.

    Raises:
        ValueError, TypeError: naming the argument, the expected and the given value.
    """
    checks.shape("qkv", qkv, "T", 3, "H", "head_dim")
    checks.floating("qkv", qkv)
    check_rows(rows, qkv)
    count, width = qkv.shape[2:]
    heads = count if heads is None else heads
    if not 0 <= heads <= count:
        raise ValueError(f"heads: expected 0 to {count}, got {heads}")
    checks.shape("rope", rope, "P", width)
    checks.dtype("rope", rope, torch.float32, torch.float64)
    checks.same_device("rope", rope, qkv.device)
    if rope.shape[0] < rows.longest:
        raise ValueError(
            f"rope: expected positions for rows of up to {rows.longest} frames, got {rope.shape[0]}"
        )
    if (q_weight is None) != (k_weight is None):
        raise ValueError("k_weight: expected both q_weight and k_weight, or neither")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            checks.shape(name, weight, width)
    if heads == 0 and q_weight is None:
        return qkv
    if in_place and torch.is_grad_enabled() and qkv.requires_grad:
        raise ValueError("in_place: expected a qkv without gradient, got requires_grad=True")
    rope, q_weight, k_weight = contiguous(rope, q_weight, k_weight)
    cpp = qkv.dtype == torch.float32 and q_weight is None
    if not (can_use_kernel(qkv) and dispatch.use_kernel(qkv, q_weight, k_weight, cpp=cpp)):
        turned = reference(qkv, rope, rows, heads, q_weight, k_weight, eps)
        return qkv.copy_(turned) if in_place else turned
    arguments = (qkv, rope, *rows, heads, q_weight, k_weight, eps)
    if in_place and _dense_heads(qkv) is qkv:
        _op_in_place(*arguments)
        return qkv
    return qkv.copy_(_op(*arguments)) if in_place else _op(*arguments)
