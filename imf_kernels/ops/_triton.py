"""The one place that imports triton, and the one place that launches.

Every launcher goes through `launch`, so that a compile check can take the real arguments, with
their real specialisation, and compile them for a card that is not there (`tests/aot.py`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch

from imf_kernels.dispatch import HAS_TRITON, INTERPRETED

if HAS_TRITON:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_wait

    jit = triton.jit
    next_power_of_2 = triton.next_power_of_2
else:
    tl = None

    def jit(fn: Any = None, **_: Any) -> Any:
        """Leave the kernel a plain function: without triton it is never launched."""
        return fn if fn is not None else (lambda inner: inner)

    def next_power_of_2(n: int) -> int:
        return 1 << max(n - 1, 0).bit_length()


DEPENDENT = HAS_TRITON and not INTERPRETED and os.environ.get("IMF_KERNELS_PDL", "0") == "1"
"""Whether kernels are launched before their predecessors in the stream have ended (programmatic
dependent launch, compute capability 9 and later): they wait then before they read anything."""
_DEPENDENCE = {"launch_pdl": True} if DEPENDENT else {}

if HAS_TRITON:
    _INTERPRETED = tl.constexpr(INTERPRETED)
    _DEPENDENT = tl.constexpr(DEPENDENT)

    @jit
    def wait_for_predecessor():
        if _DEPENDENT:
            gdc_wait()

    @jit
    def dot(b_a, b_b, ACC: tl.constexpr):
        """`a b` in full precision of its operands, accumulated in `ACC`."""
        if _INTERPRETED:  # it multiplies the bits of bfloat16
            b_a, b_b = b_a.to(ACC), b_b.to(ACC)
        return tl.dot(b_a, b_b, input_precision="ieee", out_dtype=ACC)

    @jit
    def to_e4m3(b):
        """float32 to float8_e4m3fn: to the nearest, saturating at 448, NaN stays NaN."""
        if _INTERPRETED:  # its cast knows neither NaN nor rounding below 2^-6
            b_bits = b.to(tl.int32, bitcast=True)
            b_abs = b_bits & 0x7FFFFFFF
            b_code = ((b_abs + 0x7FFFF + ((b_abs >> 20) & 1)) >> 20) - (120 << 3)
            # at 2^14 a float32's last place is 2^-9, the step of numbers below 2^-6
            b_small = (tl.abs(b) + 16384.0).to(tl.int32, bitcast=True) & 0xF
            b_code = tl.where(b_abs < 0x3C800000, b_small, tl.minimum(b_code, 0x7E))
            b_code = tl.where(b_abs > 0x7F800000, 0x7F, b_code) | ((b_bits >> 24) & 0x80)
            return b_code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        return b.to(tl.float8e4nv)

else:
    dot = to_e4m3 = wait_for_predecessor = None


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
        launcher(kernel, grid, *args, **options, **_DEPENDENCE)


__all__ = [
    "accumulator",
    "cdiv",
    "dot",
    "jit",
    "launch",
    "next_power_of_2",
    "tl",
    "to_e4m3",
    "wait_for_predecessor",
]
