"""The one place that imports triton, and the one place that launches.

Every launcher goes through `launch`, so that a compile check can take the real arguments, with
their real specialisation, and compile them for a card that is not there (`tests/aot.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from imf_kernels.dispatch import HAS_TRITON, INTERPRETED

if HAS_TRITON:
    import triton
    import triton.language as tl

    jit = triton.jit
    next_power_of_2 = triton.next_power_of_2
else:
    tl = None

    def jit(fn: Any = None, **_: Any) -> Any:
        """Leave the kernel a plain function: without triton it is never launched."""
        return fn if fn is not None else (lambda inner: inner)

    def next_power_of_2(n: int) -> int:
        return 1 << max(n - 1, 0).bit_length()


if HAS_TRITON:
    # the interpreter multiplies the bits of bfloat16
    _WIDEN_DOTS = tl.constexpr(INTERPRETED)

    @jit
    def dot(b_a, b_b, ACC: tl.constexpr):
        """`a b` in full precision of its operands, accumulated in `ACC`."""
        if _WIDEN_DOTS:
            b_a, b_b = b_a.to(ACC), b_b.to(ACC)
        return tl.dot(b_a, b_b, input_precision="ieee", out_dtype=ACC)

else:
    dot = None


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _run(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    device = args[0].device  # Triton launches on the current device, wherever the tensors are
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **options)


def accumulator(x: torch.Tensor) -> Any:
    """`wide_dtype` of `x` as a kernel's constant."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


launcher: Callable[..., None] = _run
"""What `launch` calls; a compile check replaces it."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch `kernel` over `grid`; an empty grid launches nothing."""
    if 0 not in grid:
        launcher(kernel, grid, *args, **options)


__all__ = ["accumulator", "cdiv", "dot", "jit", "launch", "next_power_of_2", "tl"]
