"""What the row-wise kernels (one frame of D channels at a time) share."""

from __future__ import annotations

from torch import Tensor

from imf_kernels import checks

FRAMES_PER_PROGRAM = 16
"""Frames that one backward program walks: its partial sums are written once per that many."""


def row_warps(block: int) -> int:
    """Warps for one row of `block` channels: 256 channels a warp keep loads at 16 bytes."""
    return min(max(block // 256, 1), 8)


def check_modulation(name: str, modulation: Tensor, x: Tensor) -> None:
    """`(B, D)` on `x`'s device with unit stride along D; the row stride is free."""
    checks.shape(name, modulation, x.shape[0], x.shape[2])
    checks.floating(name, modulation)
    checks.same_device(name, modulation, x.device)
    if modulation.shape[1] > 1 and modulation.stride(1) != 1:
        raise ValueError(f"{name}: expected unit stride along D, got strides {modulation.stride()}")
