"""Attention of a row's new frames to all of its frames, whose keys and values a cache holds.

    out[i] = sum_j softmax_j(scale q[i] . k[j]) v[j]        j over the frames that i sees

Row i owns the cache's frames `[kv_starts[i], kv_starts[i] + kv_lengths[i])`; its queries are those
of the last of them, already among the keys. What a frame sees is as in `attention`: with `chunk`,
its own block, counted from the row's first frame, and the blocks before. A row's result is bitwise
that of the row alone. Forward only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imf_kernels import checks, dispatch
from imf_kernels.ops import _attention_kernels as kernels
from imf_kernels.ops._dtypes import wide
from imf_kernels.ops._rows import check_rows, selected
from imf_kernels.ops.attention import check_chunk, cpu_forward, has_path
from imf_kernels.rows import Rows


def reference(
    q: Tensor,
    kv: Tensor,
    rows: Rows,
    kv_starts: Tensor,
    kv_lengths: Tensor,
    chunk: Tensor | None,
    scale: float,
) -> Tensor:
    """Plain PyTorch, the specification: every query against the whole cache, with a mask."""
    if rows.lengths.shape[0] == 0:
        return selected(q, rows)
    row, place = rows.places()
    seen = kv_lengths[row]
    if chunk is not None:
        block = (place + (kv_lengths - rows.lengths)[row]) // chunk[row]
        seen = torch.minimum(seen, (block + 1) * chunk[row])
    frame = torch.arange(kv.shape[0], device=kv.device) - kv_starts[row][:, None]
    sees = (frame >= 0) & (frame < seen[:, None]) & (rows.row_of >= 0)[:, None]
    read = wide(kv).masked_fill(~sees.any(0)[:, None, None, None], 0.0)  # the rest may be NaN
    k, v = read.movedim(0, 2).unbind(0)  # (H, K, head_dim)
    scores = (scale * wide(selected(q, rows)).transpose(0, 1) @ k.mT).masked_fill(~sees, -torch.inf)
    return selected((scores.softmax(-1) @ v).transpose(0, 1).to(q.dtype), rows)


@torch.library.custom_op("imf_kernels::cached_attention", mutates_args=())
def _op(
    q: Tensor,
    kv: Tensor,
    starts: Tensor,
    lengths: Tensor,
    row_of: Tensor,
    longest: int,
    kv_starts: Tensor,
    kv_lengths: Tensor,
    chunk: Tensor | None,
    scale: float,
) -> Tensor:
    q = q if q.stride(2) == 1 else q.contiguous()
    forward = kernels.forward if dispatch.runs_triton(q) else cpu_forward
    rows = Rows(starts, lengths, row_of, longest)
    return forward(q, kv, rows, kv_starts, kv_lengths, chunk, scale)[0]


@_op.register_fake
def _(q, kv, starts, lengths, row_of, longest, kv_starts, kv_lengths, chunk, scale):
    return q.new_empty(q.shape)


def cached_attention(
    q: Tensor,
    kv: Tensor,
    rows: Rows,
    kv_starts: Tensor,
    kv_lengths: Tensor,
    chunk: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of every new frame to the frames of its row that it sees.

    Args:
        q: Queries of the new frames `(T, H, head_dim)`, floating; any strides.
        kv: The cache, keys and values `(K, 2, H, head_dim)` in the dtype of `q`, head_dim of unit
            stride. Frames of no row, and those behind a row's last, may hold anything.
        rows: Where the rows' new frames lie among the T. Frames of no row are never read and
            give 0.
        kv_starts: Int32 `(R,)`: a row's first frame in the cache.
        kv_lengths: Int32 `(R,)`: its frames there, no fewer than the new ones, which are the last.
        chunk: Integer `(R,)`: frames per block of the block-causal mask; None: every new frame sees
            all of its row.
        scale: Of the scores; by default `1 / sqrt(head_dim)`.

    Returns:
        `(T, H, head_dim)`, contiguous, in the dtype of `q`; scores and sums are float32.

    Raises:
        ValueError, TypeError: naming the argument, the expected and the given value; a tensor that
            requires a gradient while gradients are enabled.
    """
    checks.shape("q", q, "T", "H", "head_dim")
    checks.floating("q", q)
    checks.shape("kv", kv, "K", 2, *q.shape[1:])
    checks.dtype("kv", kv, q.dtype)
    checks.same_device("kv", kv, q.device)
    if kv.stride(3) != 1:
        raise ValueError(f"kv: expected unit stride along head_dim, got strides {kv.stride()}")
    check_rows(rows, q)
    for name, value in (("kv_starts", kv_starts), ("kv_lengths", kv_lengths)):
        checks.shape(name, value, rows.lengths.shape[0])
        checks.dtype(name, value, torch.int32)
        checks.same_device(name, value, q.device)
    if checks.readable(kv_starts, kv_lengths) and kv_starts.numel():
        if int(kv_starts.min()) < 0 or int((kv_starts + kv_lengths).max()) > kv.shape[0]:
            raise ValueError(
                f"kv_lengths: expected rows within a cache of {kv.shape[0]} frames, "
                f"got {kv_lengths.tolist()} from {kv_starts.tolist()} on"
            )
        if int((kv_lengths - rows.lengths).min()) < 0:
            raise ValueError(
                f"kv_lengths: expected no fewer than the new frames {rows.lengths.tolist()}, "
                f"got {kv_lengths.tolist()}"
            )
    for name, tensor in (("q", q), ("kv", kv)):
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(f"{name}: expected a tensor without gradient, got requires_grad=True")
    chunk = check_chunk(chunk, q, rows)
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else float(scale)
    if not (has_path(q) and dispatch.use_kernel(q, kv, aten=True)):
        return reference(q, kv, rows, kv_starts, kv_lengths, chunk, scale)
    kv_starts, kv_lengths = kv_starts.contiguous(), kv_lengths.contiguous()
    return _op(q, kv, *rows, kv_starts, kv_lengths, chunk, scale)
