"""Matrix products of FP8 rows, `y = (q_x q_W^T) * scale_x * scale_W + b`, in bfloat16.

Both operands come from `quantize_rows`: a scale per frame and a scale per output channel leave the
product as a factor of each result, which the library's scaled product applies before it rounds.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from imf_kernels import checks, dispatch
from imf_kernels.ops.quantize_rows import FP8, Quantized, has_fp8, quantize_rows

MULTIPLE = 16
"""What K and N are multiples of: the libraries' products want rows at 16 bytes."""


def reference(x: Quantized, weight: Quantized, bias: Tensor | None) -> Tensor:
    """Plain PyTorch, the specification: summed in float32, rounded once."""
    y = (x.q.float() @ weight.q.float().t()) * x.scale * weight.scale.t()
    return (y if bias is None else y + bias.float()).to(torch.bfloat16)


def fp8_linear(x: Quantized, weight: Quantized, bias: Tensor | None) -> Tensor:
    """`x W^T + b` in bfloat16.

    Args:
        x: `(T, K)`, from `quantize_rows`.
        weight: `(N, K)`, from `quantize_rows`: a scale per output channel.
        bias: `(N,)` bfloat16, or None.

    K and N are multiples of 16. A device without such products (`runs_on`) multiplies in float32,
    which is slow.

    Raises:
        ValueError, TypeError: naming the argument, the expected and the given value.
    """
    _check(x, weight, bias)
    if dispatch.forced() == "reference" or not runs_on(x.q.device) or x.q.shape[0] == 0:
        return reference(x, weight, bias)
    return _product(x, weight, bias)


def _product(x: Quantized, weight: Quantized, bias: Tensor | None) -> Tensor:
    return torch._scaled_mm(
        x.q,
        weight.q.t(),
        x.scale,
        weight.scale.t(),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,  # what it rounds away is far below a step of e4m3
    )


def _check(x: Quantized, weight: Quantized, bias: Tensor | None) -> None:
    checks.shape("x.q", x.q, "T", "K")
    checks.shape("weight.q", weight.q, "N", x.q.shape[1])
    for name, operand in (("x", x), ("weight", weight)):
        checks.dtype(f"{name}.q", operand.q, FP8)
        checks.shape(f"{name}.scale", operand.scale, operand.q.shape[0], 1)
        checks.dtype(f"{name}.scale", operand.scale, torch.float32)
        checks.same_device(name, operand.q, x.q.device)
    if any(size % MULTIPLE for size in weight.q.shape):
        raise ValueError(f"weight.q: expected multiples of {MULTIPLE}, got {tuple(weight.q.shape)}")
    if bias is not None:
        checks.shape("bias", bias, weight.q.shape[0])
        checks.dtype("bias", bias, torch.bfloat16)
        checks.same_device("bias", bias, x.q.device)


def runs_on(device: torch.device) -> bool:
    """Whether a device has products of FP8 rows; asked of the library once, which knows."""
    return device.type == "cuda" and _multiplies(device)


dispatch.constant_to_dynamo(runs_on)


@functools.cache
def _multiplies(device: torch.device) -> bool:
    try:
        if not has_fp8(device):
            raise NotImplementedError("needs compute capability 8.9")
        one = quantize_rows(torch.ones(16, 16, device=device))
        _product(one, one, None)
    except (RuntimeError, ValueError) as error:
        warnings.warn(
            f"imf_kernels emulates FP8 products in float32 on {device}, which has none: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
