"""Attention within the rows of a batch, padded or packed, from packed q, k, v.

    out[i] = sum_j softmax_j(scale q[i] . k[j]) v[j]        j over the frames that i sees

A frame sees its row's frames; with `chunk`, those of its own block of that many frames and of all
blocks before it (block-causal streaming). Both follow from lengths: no mask exists anywhere. A
row's result is bitwise that of the row alone, whatever its neighbours and its place.

CUDA runs our Triton kernels, or another library's flash attention where that serves (`_flash`);
the CPU our C++ kernel, or PyTorch's. `imf_kernels.backends()["attention"]` says which.
(Online softmax and its backward: FlashAttention-2, arXiv 2307.08691.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from imf_kernels import checks, dispatch, masks
from imf_kernels.ops import _attention_kernels as kernels
from imf_kernels.ops import _flash
from imf_kernels.ops._dtypes import wide, wide_dtype
from imf_kernels.ops._rows import check_rows, selected
from imf_kernels.rows import Rows


def reference(qkv: Tensor, rows: Rows, chunk: Tensor | None, scale: float) -> Tensor:
    """Plain PyTorch, the specification: rows side by side, with a mask."""
    if rows.lengths.shape[0] == 0:
        return selected(qkv[:, 0], rows)
    longest, device = rows.longest, qkv.device
    place = torch.arange(longest, device=device)
    frame = (rows.starts[:-1, None] + place).clamp(max=max(qkv.shape[0] - 1, 0))
    q, k, v = selected(qkv, rows)[frame].movedim(1, 3).unbind(1)  # (R, H, N, head_dim)
    sees = masks.inside(rows.lengths, longest)[:, None, :]
    if chunk is not None:
        block = place // chunk[:, None]
        sees = sees & (block[:, None, :] <= block[:, :, None])
    out = _attend(q, k, v, sees[:, None], scale).transpose(1, 2)
    row = rows.row_of.clamp(min=0)
    position = (torch.arange(qkv.shape[0], device=device) - rows.starts[row]).clamp(0, longest - 1)
    return selected(out[row, position].to(qkv.dtype), rows)


def _attend(q: Tensor, k: Tensor, v: Tensor, sees: Tensor, scale: float) -> Tensor:
    """Every query's softmax over the keys that it sees."""
    if torch.compiler.is_exporting():  # the one form that compilers know to store no scores
        return F.scaled_dot_product_attention(q, k, v, sees, scale=scale)
    scores = (scale * wide(q) @ wide(k).mT).masked_fill(~sees, -torch.inf)
    return scores.softmax(-1) @ wide(v)


def _pieces(
    rows: Rows, kv_starts: Tensor, kv_lengths: Tensor, chunk: Tensor | None
) -> Iterator[tuple[slice, slice]]:
    """Queries and the keys that all of them see, on the CPU: whole rows, or a row's blocks."""
    blocks = [None] * len(rows.lengths) if chunk is None else chunk.tolist()
    where = (rows.starts[:-1], rows.lengths, kv_starts[: len(blocks)], kv_lengths)
    for start, length, kv_start, seen, block in zip(
        *(part.tolist() for part in where), blocks, strict=True
    ):
        before = seen - length  # the row's frames of which there are keys alone
        first = before
        while first < seen:
            last = seen if block is None else min((first // block + 1) * block, seen)
            queries = slice(start + first - before, start + last - before)
            yield queries, slice(kv_start, kv_start + last)
            first = last


def _heads(x: Tensor) -> Tensor:
    """`(T, H, head_dim)` as `(1, H, T, head_dim)`."""
    return x[None].transpose(1, 2)


def cpu_forward(
    q: Tensor,
    kv: Tensor,
    rows: Rows,
    kv_starts: Tensor,
    kv_lengths: Tensor,
    chunk: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As `kernels.forward`, the logarithms being natural ones."""
    frames, heads, width = q.shape
    make = q.new_empty if int(rows.lengths.sum()) == frames else q.new_zeros
    out = make((frames, heads, width))
    lse = make((heads, frames), dtype=wide_dtype(q))
    pieces = list(_pieces(rows, kv_starts, kv_lengths, chunk))
    if width == 64 and q.dtype == torch.float32 and _cpp_runs():
        bounds = [(a.start, a.stop, b.start, b.stop) for a, b in pieces]
        lists = [list(bound) for bound in zip(*bounds, strict=True)] or [[], [], [], []]
        torch.ops.imf_kernels.attention_cpu(q, kv, *lists, scale, out, lse)
        return out, lse
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    k, v = kv.unbind(1)
    for queries, keys in pieces:
        piece, sums = flash(_heads(q[queries]), _heads(k[keys]), _heads(v[keys]), scale=scale)
        out[queries] = piece[0].transpose(0, 1)
        lse[:, queries] = sums[0]
    return out, lse


@functools.cache
def _cpp_runs() -> bool:
    return dispatch.HAS_EXTENSION and torch.ops.imf_kernels.attention_cpu_runs()


def _cpu_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Rows,
    chunk: Tensor | None,
    scale: float,
) -> Tensor:
    back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    q, k, v = qkv.unbind(1)
    grad_qkv = qkv.new_zeros(qkv.shape)
    for queries, keys in _pieces(rows, rows.starts, rows.lengths, chunk):
        ends = (_heads(grad[queries]), _heads(q[queries]), _heads(k[keys]), _heads(v[keys]))
        sums = lse[None, :, queries].contiguous()
        parts = back(*ends, _heads(out[queries]), sums, 0.0, False, scale=scale)
        for section, span, part in zip(range(3), (queries, keys, keys), parts, strict=True):
            grad_qkv[span, section] += part[0].transpose(0, 1)
    return grad_qkv


@torch.library.custom_op("imf_kernels::attention", mutates_args=())
def _op(
    qkv: Tensor,
    starts: Tensor,
    lengths: Tensor,
    row_of: Tensor,
    longest: int,
    chunk: Tensor | None,
    scale: float,
    library: str,
) -> tuple[Tensor, Tensor]:
    """The result, and the logarithm of every softmax's sum (in the units of its path)."""
    qkv = qkv if qkv.stride(3) == 1 else qkv.contiguous()
    rows = Rows(starts, lengths, row_of, longest)
    if library:
        return _flash.forward(library, qkv, rows, scale)
    forward = kernels.forward if dispatch.runs_triton(qkv) else cpu_forward
    return forward(qkv[:, 0], qkv[:, 1:], rows, starts, lengths, chunk, scale)


@_op.register_fake
def _(qkv, starts, lengths, row_of, longest, chunk, scale, library):
    frames, _, heads, width = qkv.shape
    sums = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty((frames, heads, width)), qkv.new_empty((heads, frames), dtype=sums)


@torch.library.custom_op("imf_kernels::attention_backward", mutates_args=())
def _op_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    lengths: Tensor,
    row_of: Tensor,
    longest: int,
    chunk: Tensor | None,
    scale: float,
) -> Tensor:
    qkv = qkv if qkv.stride(3) == 1 else qkv.contiguous()
    rows = Rows(starts, lengths, row_of, longest)
    if dispatch.runs_triton(qkv):
        return kernels.backward(grad.contiguous(), qkv, out, lse, rows, chunk, scale)
    return _cpu_backward(grad, qkv, out, lse, rows, chunk, scale)


@_op_backward.register_fake
def _(grad, qkv, out, lse, starts, lengths, row_of, longest, chunk, scale):
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx, inputs, output):
    qkv, starts, lengths, row_of, ctx.longest, chunk, ctx.scale, ctx.library = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, *output, starts, lengths, row_of, chunk)


def _backward(ctx, grad, _):
    qkv, out, lse, *rows, chunk = ctx.saved_tensors
    if ctx.library:  # the backward is ours, whoever went forward
        lse = lse * kernels.LOG2_E
    back = _op_backward(grad, qkv, out, lse, *rows, ctx.longest, chunk, ctx.scale)
    return back, *[None] * 7


_op.register_autograd(_backward, setup_context=_setup_context)


def attention(
    qkv: Tensor,
    rows: Rows,
    chunk: Tensor | None = None,
    scale: float | None = None,
    *,
    finite: bool = False,
) -> Tensor:
    """Softmax attention of every frame to the frames of its row that it sees.

    Args:
        qkv: Queries, keys and values `(T, 3, H, head_dim)`, floating; any strides.
        rows: Where the rows lie among the T frames. Frames of no row are never read and give 0.
        chunk: Integer `(R,)`: frames per block of the block-causal mask; None: full attention.
        scale: Of the scores; by default `1 / sqrt(head_dim)`.
        finite: Whether the frames of no row hold finite numbers. Other libraries' kernels may read
            them, multiplied by 0, and serve only then.

    Returns:
        `(T, H, head_dim)`, contiguous, in the dtype of `qkv`; scores and sums are float32.

    Gradients pass to `qkv`, deterministically.

    Raises:
        ValueError, TypeError: naming the argument, the expected and the given value.
    """
    checks.shape("qkv", qkv, "T", 3, "H", "head_dim")
    checks.floating("qkv", qkv)
    check_rows(rows, qkv)
    chunk = check_chunk(chunk, qkv, rows)
    scale = 1 / math.sqrt(qkv.shape[3]) if scale is None else float(scale)
    if not (has_path(qkv) and dispatch.use_kernel(qkv, aten=True)):
        return reference(qkv, rows, chunk, scale)
    library = _flash.OURS
    if chunk is None and finite and qkv.is_cuda and qkv.numel() and rows.lengths.numel():
        library = _flash.choose(qkv.device, qkv.dtype, int(qkv.shape[3]))
    return _op(qkv, *rows, chunk, scale, library)[0]


def check_chunk(chunk: Tensor | None, x: Tensor, rows: Rows) -> Tensor | None:
    """Frames per block of each row, on `x`'s device, contiguous; or none."""
    if chunk is None:
        return None
    checks.shape("chunk", chunk, rows.lengths.shape[0])
    checks.dtype("chunk", chunk, torch.int64, torch.int32)
    checks.same_device("chunk", chunk, x.device)
    if checks.readable(chunk) and chunk.numel() and int(chunk.min()) < 1:
        raise ValueError(f"chunk: expected blocks of 1 frame or more, got {chunk.tolist()}")
    return chunk.contiguous()


def has_path(x: Tensor) -> bool:
    """Whether there are kernels for heads and dtype of `x` `(..., head_dim)`, where it lies."""
    triton = x.is_cuda or dispatch.forced() == "triton"
    return kernels.can_use(x) if triton else True


def _path() -> str:
    """What runs full attention with heads of 64: in bfloat16 on CUDA, in float32 on the CPU."""
    choice = dispatch.forced()
    if choice in ("reference", "triton"):
        return choice
    if not torch.cuda.is_available():
        return "cpp" if _cpp_runs() else "sdpa"
    device = torch.device("cuda", torch.cuda.current_device())
    return _flash.choose(device, torch.bfloat16, 64) or "triton"


dispatch.report("attention", _path)
