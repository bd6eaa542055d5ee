"""The Triton kernels of `attention`, forward and backward, and their launchers.

Programs are laid out as (block of the row's frames, head, row); one row more than there are writes
zeros for the frames of no row. Keys are walked in blocks from the row's own start, in sizes that
depend on dtype and head width alone: hence a row's bits do not depend on the batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imf_kernels.ops._dtypes import wide_dtype
from imf_kernels.ops._triton import accumulator, cdiv, dot, jit, launch, tl, wait_for_predecessor
from imf_kernels.rows import Rows

LOG2_E = math.log2(math.e)


@jit
def _zero_frames_of_no_row(
    p_out, p_row_of, frames, stride_frame, o_head, DH: tl.constexpr, BLOCK: tl.constexpr
):
    """Of one head: `o_head` is its offset within a frame."""
    o_d = tl.arange(0, DH)[None, :]
    b_zero = tl.zeros([BLOCK, DH], p_out.dtype.element_ty)
    for first in range(tl.program_id(0) * BLOCK, frames, tl.num_programs(0) * BLOCK):
        o = first + tl.arange(0, BLOCK)
        m = tl.load(p_row_of + o, mask=o < frames, other=0) < 0
        o_frame = o.to(tl.int64)[:, None] * stride_frame
        tl.store(p_out + o_frame + o_head + o_d, b_zero, mask=m[:, None])


@jit(do_not_specialize=["frames"])
def _clear_kernel(
    p_out, p_row_of, frames, HEADS: tl.constexpr, DH: tl.constexpr, BLOCK: tl.constexpr
):
    wait_for_predecessor()
    o_head = tl.program_id(1) * DH
    _zero_frames_of_no_row(p_out, p_row_of, frames, HEADS * DH, o_head, DH, BLOCK)


@jit(do_not_specialize=["frames", "rows"])
def _forward_kernel(
    p_q,
    p_kv,
    p_starts,
    p_lengths,
    p_row_of,
    p_kv_starts,
    p_kv_lengths,
    p_chunk,
    p_out,
    p_lse,
    frames,
    rows,
    stride_q_frame,
    stride_q_head,
    stride_frame,
    stride_section,
    stride_head,
    scale,
    HEADS: tl.constexpr,
    DH: tl.constexpr,
    HAS_CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    """A row's queries are the last of the frames that it has keys of.

    Scores are kept in units of log 2: `scale` holds log2(e).
    """
    wait_for_predecessor()
    head = tl.program_id(1)
    row = tl.program_id(2)
    if row == rows:
        _zero_frames_of_no_row(p_out, p_row_of, frames, HEADS * DH, head * DH, DH, BLOCK_M)
    else:
        start = tl.load(p_starts + row).to(tl.int64)
        length = tl.load(p_lengths + row)
        kv_start = tl.load(p_kv_starts + row).to(tl.int64)
        kv_length = tl.load(p_kv_lengths + row)
        before = kv_length - length
        first = tl.program_id(0) * BLOCK_M
        if first < length:
            dtype = p_q.dtype.element_ty
            o_m = first + tl.arange(0, BLOCK_M)
            o_n = tl.arange(0, BLOCK_N)
            o_d = tl.arange(0, DH)
            m_m = o_m < length
            p_k = p_kv + kv_start * stride_frame + head * stride_head
            p_v = p_k + stride_section
            o_q = (start + o_m)[:, None] * stride_q_frame + head * stride_q_head + o_d[None, :]
            b_q = tl.load(p_q + o_q, mask=m_m[:, None], other=0.0)
            seen = kv_length
            if HAS_CHUNK:
                chunk = tl.load(p_chunk + row).to(tl.int32)
                b_seen = tl.minimum(((before + o_m) // chunk + 1) * chunk, kv_length)
                last = before + tl.minimum(first + BLOCK_M, length) - 1
                seen = tl.minimum((last // chunk + 1) * chunk, kv_length)
            b_max = tl.full([BLOCK_M], float("-inf"), ACC)
            b_sum = tl.zeros([BLOCK_M], ACC)
            b_out = tl.zeros([BLOCK_M, DH], ACC)
            for n in range(0, seen, BLOCK_N):
                o_key = (n + o_n).to(tl.int64) * stride_frame
                m_n = n + o_n < seen
                b_k = tl.load(p_k + o_key[None, :] + o_d[:, None], mask=m_n[None, :], other=0.0)
                b_s = dot(b_q, b_k, ACC) * scale
                sees = m_n[None, :]
                if HAS_CHUNK:
                    sees = (n + o_n)[None, :] < b_seen[:, None]
                b_s = tl.where(sees, b_s, float("-inf"))
                b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
                b_p = tl.exp2(b_s - b_new_max[:, None])
                b_alpha = tl.exp2(b_max - b_new_max)
                b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
                b_v = tl.load(p_v + o_key[:, None] + o_d[None, :], mask=m_n[:, None], other=0.0)
                b_out = b_out * b_alpha[:, None]
                b_out += dot(b_p.to(dtype), b_v, ACC)
                b_max = b_new_max
            b_out = b_out / b_sum[:, None]
            start = tl.load(p_starts + row).to(tl.int64)  # kept over the loop, it would spill
            o_out = (start + o_m)[:, None] * (HEADS * DH) + head * DH + o_d[None, :]
            tl.store(p_out + o_out, b_out.to(dtype), mask=m_m[:, None])
            p_row = p_lse + head.to(tl.int64) * frames + start
            tl.store(p_row + o_m, b_max + tl.log2(b_sum), mask=m_m)


@jit(do_not_specialize=["frames", "rows"])
def _backward_q_kernel(
    p_grad,
    p_qkv,
    p_out,
    p_lse,
    p_starts,
    p_lengths,
    p_row_of,
    p_chunk,
    p_grad_qkv,
    p_delta,
    frames,
    rows,
    stride_frame,
    stride_section,
    stride_head,
    scale,
    scale_log2,
    HEADS: tl.constexpr,
    DH: tl.constexpr,
    HAS_CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    """dq = scale sum_j p_ij (do_i . v_j - delta_i) k_j, delta_i = do_i . out_i, kept for dk."""
    wait_for_predecessor()
    head = tl.program_id(1)
    row = tl.program_id(2)
    grad_frame = 3 * HEADS * DH
    if row == rows:
        for section in tl.static_range(3):
            o_head = (section * HEADS + head) * DH
            _zero_frames_of_no_row(p_grad_qkv, p_row_of, frames, grad_frame, o_head, DH, BLOCK_M)
    else:
        start = tl.load(p_starts + row).to(tl.int64)
        length = tl.load(p_lengths + row)
        first = tl.program_id(0) * BLOCK_M
        if first < length:
            dtype = p_qkv.dtype.element_ty
            o_m = first + tl.arange(0, BLOCK_M)
            o_n = tl.arange(0, BLOCK_N)
            o_d = tl.arange(0, DH)
            m_m = o_m < length
            p_q = p_qkv + start * stride_frame + head * stride_head
            p_k = p_q + stride_section
            p_v = p_k + stride_section
            o_q = o_m.to(tl.int64)[:, None] * stride_frame + o_d[None, :]
            b_q = tl.load(p_q + o_q, mask=m_m[:, None], other=0.0)
            o_out = (start + o_m)[:, None] * (HEADS * DH) + head * DH + o_d[None, :]
            b_grad = tl.load(p_grad + o_out, mask=m_m[:, None], other=0.0)
            b_out = tl.load(p_out + o_out, mask=m_m[:, None], other=0.0)
            b_delta = tl.sum(b_grad.to(ACC) * b_out.to(ACC), 1)
            o_row = head.to(tl.int64) * frames + start + o_m
            tl.store(p_delta + o_row, b_delta, mask=m_m)
            b_lse = tl.load(p_lse + o_row, mask=m_m, other=0.0)
            seen = length
            if HAS_CHUNK:
                chunk = tl.load(p_chunk + row).to(tl.int32)
                b_seen = (o_m // chunk + 1) * chunk
                last = tl.minimum(first + BLOCK_M, length) - 1
                seen = tl.minimum((last // chunk + 1) * chunk, length)
            b_grad_q = tl.zeros([BLOCK_M, DH], ACC)
            for n in range(0, seen, BLOCK_N):
                o_key = (n + o_n).to(tl.int64)[:, None] * stride_frame + o_d[None, :]
                m_n = n + o_n < length
                b_k = tl.load(p_k + o_key, mask=m_n[:, None], other=0.0)
                b_v = tl.load(p_v + o_key, mask=m_n[:, None], other=0.0)
                b_s = dot(b_q, tl.trans(b_k), ACC)
                sees = m_n[None, :] & m_m[:, None]
                if HAS_CHUNK:
                    sees = sees & ((n + o_n)[None, :] < b_seen[:, None])
                b_p = tl.where(sees, tl.exp2(b_s * scale_log2 - b_lse[:, None]), 0.0)
                b_dp = dot(b_grad, tl.trans(b_v), ACC)
                b_ds = (b_p * (b_dp - b_delta[:, None])).to(dtype)
                b_grad_q += dot(b_ds, b_k, ACC)
            o_grad = (start + o_m)[:, None] * grad_frame + head * DH + o_d[None, :]
            tl.store(p_grad_qkv + o_grad, (b_grad_q * scale).to(dtype), mask=m_m[:, None])


@jit(do_not_specialize=["frames"])
def _backward_kv_kernel(
    p_grad,
    p_qkv,
    p_lse,
    p_delta,
    p_starts,
    p_lengths,
    p_chunk,
    p_grad_qkv,
    frames,
    stride_frame,
    stride_section,
    stride_head,
    scale,
    scale_log2,
    HEADS: tl.constexpr,
    DH: tl.constexpr,
    HAS_CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    """dv_j = sum_i p_ij do_i and dk_j = scale sum_i p_ij (do_i . v_j - delta_i) q_i."""
    wait_for_predecessor()
    head = tl.program_id(1)
    row = tl.program_id(2)
    start = tl.load(p_starts + row).to(tl.int64)
    length = tl.load(p_lengths + row)
    first = tl.program_id(0) * BLOCK_N
    if first < length:
        dtype = p_qkv.dtype.element_ty
        o_n = first + tl.arange(0, BLOCK_N)
        o_m = tl.arange(0, BLOCK_M)
        o_d = tl.arange(0, DH)
        m_n = o_n < length
        p_q = p_qkv + start * stride_frame + head * stride_head
        o_key = o_n.to(tl.int64)[:, None] * stride_frame + o_d[None, :]
        b_k = tl.load(p_q + stride_section + o_key, mask=m_n[:, None], other=0.0)
        b_v = tl.load(p_q + 2 * stride_section + o_key, mask=m_n[:, None], other=0.0)
        begin = 0
        if HAS_CHUNK:
            chunk = tl.load(p_chunk + row).to(tl.int32)
            b_seen_from = o_n // chunk * chunk
            begin = first // chunk * chunk // BLOCK_M * BLOCK_M
        p_row = head.to(tl.int64) * frames + start
        b_grad_k = tl.zeros([BLOCK_N, DH], ACC)
        b_grad_v = tl.zeros([BLOCK_N, DH], ACC)
        for i in range(begin, length, BLOCK_M):
            m_m = i + o_m < length
            o_q = (i + o_m).to(tl.int64)[:, None] * stride_frame + o_d[None, :]
            b_q = tl.load(p_q + o_q, mask=m_m[:, None], other=0.0)
            o_out = (start + i + o_m)[:, None] * (HEADS * DH) + head * DH + o_d[None, :]
            b_grad = tl.load(p_grad + o_out, mask=m_m[:, None], other=0.0)
            b_lse = tl.load(p_lse + p_row + i + o_m, mask=m_m, other=0.0)
            b_delta = tl.load(p_delta + p_row + i + o_m, mask=m_m, other=0.0)
            b_s = dot(b_k, tl.trans(b_q), ACC)
            sees = m_n[:, None] & m_m[None, :]
            if HAS_CHUNK:
                sees = sees & ((i + o_m)[None, :] >= b_seen_from[:, None])
            b_p = tl.where(sees, tl.exp2(b_s * scale_log2 - b_lse[None, :]), 0.0)
            b_grad_v += dot(b_p.to(dtype), b_grad, ACC)
            b_dp = dot(b_v, tl.trans(b_grad), ACC)
            b_ds = (b_p * (b_dp - b_delta[None, :])).to(dtype)
            b_grad_k += dot(b_ds, b_q, ACC)
        o_grad = (start + o_n)[:, None] * (3 * HEADS * DH) + head * DH + o_d[None, :]
        p_grad_k = p_grad_qkv + HEADS * DH + o_grad
        tl.store(p_grad_k, (b_grad_k * scale).to(dtype), mask=m_n[:, None])
        tl.store(p_grad_k + HEADS * DH, b_grad_v.to(dtype), mask=m_n[:, None])


def can_use(x: Tensor) -> bool:
    """Head widths, `x`'s last dimension, and dtypes that the kernels are made for."""
    half = (torch.float32, torch.bfloat16, torch.float16)
    return x.shape[-1] in (32, 64, 128) and x.dtype in half


def _blocks(x: Tensor, backward: bool) -> dict[str, int]:
    """Tile sizes and launch options; of dtype and head width only."""
    width = x.shape[-1]
    if x.dtype == torch.float32:  # products on the scalar units, operands in registers
        if backward and width <= 64:
            return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
        size = 32 if width <= 64 else 16
        return {"BLOCK_M": size, "BLOCK_N": size, "num_warps": 4, "num_stages": 2}
    rows = 64 if backward else 128
    warps = 4 if width <= (64 if backward else 32) else 8
    return {"BLOCK_M": rows, "BLOCK_N": 64, "num_warps": warps, "num_stages": 2}


def forward(
    q: Tensor,
    kv: Tensor,
    rows: Rows,
    kv_starts: Tensor,
    kv_lengths: Tensor,
    chunk: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`(T, H, head_dim)`, and per softmax the base-2 logarithm of its sum, `(H, T)`.

    The keys and values of row i are `kv` `(K, 2, H, head_dim)` from `kv_starts[i]` on, as many as
    `kv_lengths[i]`, and its queries those of the last of these frames.
    """
    frames, heads, width = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((heads, frames), dtype=wide_dtype(q))
    blocks = _blocks(q, backward=False)
    count = rows.lengths.shape[0]
    launch(
        _forward_kernel,
        (max(cdiv(rows.longest, blocks["BLOCK_M"]), 1), heads, count + 1),
        q,
        kv,
        rows.starts,
        rows.lengths,
        rows.row_of,
        kv_starts,
        kv_lengths,
        chunk,
        out,
        lse,
        frames,
        count,
        *q.stride()[:2],
        *kv.stride()[:3],
        scale * LOG2_E,
        HEADS=heads,
        DH=width,
        HAS_CHUNK=chunk is not None,
        ACC=accumulator(q),
        **blocks,
    )
    return out, lse


def clear(out: Tensor, rows: Rows) -> None:
    """Set the frames of no row, of `(T, H, head_dim)`, to 0."""
    frames, heads, width = out.shape
    sizes = {"HEADS": heads, "DH": width, "BLOCK": 64}
    grid = (min(cdiv(frames, sizes["BLOCK"]), 64), heads)
    launch(_clear_kernel, grid, out, rows.row_of, frames, **sizes)


def backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Rows,
    chunk: Tensor | None,
    scale: float,
) -> Tensor:
    """`(T, 3, H, head_dim)`, contiguous."""
    frames, _, heads, width = qkv.shape
    grad_qkv = qkv.new_empty(qkv.shape)
    delta = lse.new_empty(lse.shape)
    blocks = _blocks(qkv, backward=True)
    count = rows.lengths.shape[0]
    shared = {
        "HEADS": heads,
        "DH": width,
        "HAS_CHUNK": chunk is not None,
        "ACC": accumulator(qkv),
        **blocks,
    }
    launch(
        _backward_q_kernel,
        (max(cdiv(rows.longest, blocks["BLOCK_M"]), 1), heads, count + 1),
        grad,
        qkv,
        out,
        lse,
        rows.starts,
        rows.lengths,
        rows.row_of,
        chunk,
        grad_qkv,
        delta,
        frames,
        count,
        *qkv.stride()[:3],
        scale,
        scale * LOG2_E,
        **shared,
    )
    launch(
        _backward_kv_kernel,
        (cdiv(rows.longest, blocks["BLOCK_N"]), heads, count),
        grad,
        qkv,
        lse,
        delta,
        rows.starts,
        rows.lengths,
        chunk,
        grad_qkv,
        frames,
        *qkv.stride()[:3],
        scale,
        scale * LOG2_E,
        **{**shared, "num_stages": 1 if qkv.dtype == torch.float32 else 2},  # else it spills
    )
    return grad_qkv
