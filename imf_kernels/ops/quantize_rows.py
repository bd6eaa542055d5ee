"""Rows in FP8, each with a scale of its own, optionally after GELU-tanh:

    scale = max(max |x| / 448, 2^-126)
    q     = e4m3(x / scale)             x is about q * scale

448 is the largest number of float8_e4m3fn, so nothing overflows; a row of zeros stays zeros. A row
that holds NaN or an infinity holds NaN in FP8 as well, in its numbers or its scale. Rows are the
frames of activations, and the output channels of a weight. (FP8 formats, arXiv 2209.05433.)
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from imf_kernels import checks, dispatch
from imf_kernels.ops._rows import row_warps
from imf_kernels.ops._triton import jit, launch, next_power_of_2, tl, to_e4m3, wait_for_predecessor

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class Quantized(NamedTuple):
    """`q` float8_e4m3fn `(T, K)` and `scale` float32 `(T, 1)`, together `q * scale`."""

    q: Tensor
    scale: Tensor

    def float(self) -> Tensor:
        """Float32 `(T, K)`."""
        return self.q.float() * self.scale


def reference(x: Tensor, gelu: bool) -> Quantized:
    """Plain PyTorch, the specification."""
    x = x.float()
    if gelu:
        x = F.gelu(x, approximate="tanh")
    scale = (x.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=SMALLEST_SCALE)
    return Quantized((x / scale).clamp(-LARGEST, LARGEST).to(FP8), scale)


@jit
def store_quantized(p_q, p_scale, b, m):
    """Store one row of float32, which is 0 where it is masked."""
    scale = tl.maximum(tl.max(tl.abs(b), 0) / 448.0, 1.1754943508222875e-38)
    tl.store(p_scale, scale)
    tl.store(p_q, to_e4m3(b / scale), mask=m)


@jit
def _kernel(p_x, p_q, p_scale, K: tl.constexpr, BLOCK_K: tl.constexpr, GELU: tl.constexpr):
    wait_for_predecessor()
    row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK_K)
    m = o < K
    b_x = tl.load(p_x + row * K + o, mask=m, other=0.0).to(tl.float32)
    if GELU:
        # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z))
        b_z = 0.7978845608028654 * (b_x + 0.044715 * b_x * b_x * b_x)
        b_x = b_x / (1 + tl.exp(-2 * b_z))
    store_quantized(p_q + row * K + o, p_scale + row, b_x, m)


def _launch(x: Tensor, gelu: bool) -> Quantized:
    out = empty(x)
    rows, width = x.shape
    block = next_power_of_2(width)
    launch(
        _kernel,
        (rows,),
        x,
        *out,
        K=width,
        BLOCK_K=block,
        GELU=gelu,
        num_warps=row_warps(block),
    )
    return out


def empty(x: Tensor) -> Quantized:
    """Uninitialised, for the rows of `x`."""
    return Quantized(
        x.new_empty(x.shape, dtype=FP8),
        x.new_empty((x.shape[0], 1), dtype=torch.float32),
    )


def runs_triton(x: Tensor) -> bool:
    """Whether a Triton kernel quantises `x`: `dispatch.runs_triton`, where FP8 can be written."""
    return dispatch.runs_triton(x) and (not x.is_cuda or has_fp8(x.device))


@functools.cache
def has_fp8(device: torch.device) -> bool:
    """Whether a CUDA device converts to FP8: compute capability 8.9 and later."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


@torch.library.custom_op("imf_kernels::quantize_rows", mutates_args=())
def _op(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    return _launch(x.contiguous(), gelu) if runs_triton(x) else reference(x, gelu)


@_op.register_fake
def _(x, gelu):
    return tuple(empty(x))


def quantize_rows(x: Tensor, gelu: bool = False) -> Quantized:
    """Every row in FP8 with its own scale.

    Args:
        x: `(T, K)`, floating, without gradient.
        gelu: Quantise `gelu_tanh(x)` instead, computed in float32.

    Raises:
        ValueError, TypeError: naming the argument, the expected and the given value.
    """
    checks.shape("x", x, "T", "K")
    checks.floating("x", x)
    check_no_gradient(x=x)
    return Quantized(*_op(x, gelu)) if dispatch.use_kernel(x) else reference(x, gelu)


def check_no_gradient(**tensors: Tensor | None) -> None:
    """FP8 is for inference: a gradient would be that of a staircase."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor without gradient (FP8 is for inference), "
                "got requires_grad=True"
            )
