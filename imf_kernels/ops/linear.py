"""Matrix products of the model, `y = x W^T + b`, optionally with GELU-tanh in the same pass.

The products are the libraries' own: what is chosen here is which. On CUDA cuBLASLt has the GELU in
its epilogue; on the CPU oneDNN has it, and reads the weights as they lie, so that nothing derived
from them can go stale. Training keeps the pre-activation for its backward, in plain PyTorch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from imf_kernels import dispatch


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """`x W^T + b`, or `gelu_tanh(x W^T + b)`.

    Args:
        x: `(T, K)`; weight: `(N, K)`; bias: `(N,)` or None.

    Gradients pass to all three. Under autocast this is `F.linear` and `F.gelu`.
    """
    if dispatch.forced() != "reference" and not _recorded(x, weight, bias):
        if _onednn(x, weight):
            activation: Any = ("gelu", [], "tanh") if gelu else ("none", [], "")
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *activation)
        if gelu and bias is not None and _epilogue_is_tanh(x):
            return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


def _recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd, autocast or a tracer looks on: they know F.linear."""
    x = tensors[0]
    assert x is not None
    return (
        torch.compiler.is_compiling()
        or (x.device.type != "meta" and torch.is_autocast_enabled(x.device.type))
        or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))
    )


def _onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.ndim == 2
        and weight.is_contiguous()  # oneDNN is slow on slices
        and x.numel() > 0
        and bool(torch.backends.mkldnn.enabled)
        and _has_onednn()
    )


@functools.cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _epilogue_is_tanh(x: Tensor) -> bool:
    """False where it may not be probed, and has not been: the probe reads its result."""
    if not (x.is_cuda and x.ndim == 2):
        return False
    key = (x.device, x.dtype)
    if key not in _epilogues and dispatch.may_probe():
        with dispatch.probing():
            _epilogues[key] = _probe(*key)
    return _epilogues.get(key, False)


_epilogues: dict[tuple[torch.device, torch.dtype], bool] = {}


def _probe(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch's fused GELU is tanh's: some builds have the exact one.

    Compared where the two differ most and half precision is fine enough to tell them apart.
    """
    x = torch.linspace(-3, -1.5, 512 * 64, device=device).view(512, 64).to(dtype)
    weight, bias = torch.eye(64, device=device, dtype=dtype), x.new_zeros(64)
    y = torch._addmm_activation(bias, x, weight, use_gelu=True).float()
    tanh, exact = (F.gelu(x.float(), approximate=kind) for kind in ("tanh", "none"))
    return bool((y - tanh).abs().mean() < (y - exact).abs().mean())
