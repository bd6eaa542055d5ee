"""What the row-wise kernels (one frame of D channels at a time) share."""

from __future__ import annotations

import torch
from torch import Tensor

from imf_kernels import checks
from imf_kernels.rows import Rows

FRAMES_PER_PROGRAM = 16
"""Frames that one backward program walks: its partial sums are written once per that many."""


def row_warps(block: int) -> int:
    """Warps for one row of `block` channels: 256 channels a warp keep loads at 16 bytes."""
    return min(max(block // 256, 1), 8)


def check_rows(rows: Rows, x: Tensor) -> None:
    """A layout of `x`'s T frames (its first dimension), on its device."""
    if not isinstance(rows, Rows):
        raise TypeError(f"rows: expected Rows, got {type(rows).__name__}")
    checks.shape("rows.row_of", rows.row_of, x.shape[0])
    checks.shape("rows.lengths", rows.lengths, "R")
    checks.shape("rows.starts", rows.starts, rows.lengths.shape[0] + 1)
    for name in ("starts", "lengths", "row_of"):
        part = getattr(rows, name)
        checks.dtype(f"rows.{name}", part, torch.int32)
        checks.same_device(f"rows.{name}", part, x.device)
        if not part.is_contiguous():
            raise ValueError(f"rows.{name}: expected a contiguous tensor, got {part.stride()}")


def check_modulation(name: str, modulation: Tensor, x: Tensor, rows: Rows | None) -> None:
    """`(R, D)`, or `(1, D)` for all rows, with unit stride along D; the row stride is free."""
    count = 1 if rows is None else rows.lengths.shape[0]
    expected = 1 if isinstance(modulation, Tensor) and modulation.shape[:1] == (1,) else count
    checks.shape(name, modulation, expected, x.shape[1])
    checks.floating(name, modulation)
    checks.same_device(name, modulation, x.device)
    if modulation.shape[1] > 1 and modulation.stride(1) != 1:
        raise ValueError(f"{name}: expected unit stride along D, got strides {modulation.stride()}")


def row_stride(modulation: Tensor) -> int:
    """Elements from one row's modulation to the next; 0 where one serves all rows."""
    return modulation.stride(0) if modulation.shape[0] > 1 else 0


def per_frame(modulation: Tensor, rows: Rows | None) -> Tensor:
    """`(R, D)` as one that broadcasts over T frames; frames of no row take any."""
    if rows is None or modulation.shape[0] == 1:
        return modulation
    return modulation[rows.row_of.clamp(min=0)]


def selected(x: Tensor, rows: Rows | None) -> Tensor:
    """Frames `(T, ...)` of rows as they are, frames of none 0, whatever they hold."""
    if rows is None:
        return x
    outside = (rows.row_of < 0).view(-1, *[1] * (x.ndim - 1))
    return x.masked_fill(outside, 0.0)


def row_sums(x: Tensor, rows: Rows | None) -> Tensor:
    """`(T, D)` to `(R, D)`, without the frames of no row."""
    if rows is None:
        return x.sum(0, keepdim=True)
    sums = x.new_zeros(rows.lengths.shape[0], x.shape[1])
    return sums.index_add_(0, rows.row_of.clamp(min=0), selected(x, rows))
