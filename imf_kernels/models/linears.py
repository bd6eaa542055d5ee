"""How models run their linear layers: through the op, and as one product where they share input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imf_kernels.ops.linear import linear


def plain(layer: Any) -> bool:
    """Whether a layer is what it was built as: no adapter in its place, no hooks on it."""
    return type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks)


def apply(layer: Any, x: Tensor, gelu: bool = False) -> Tensor:
    """`layer(x)` for `x` `(T, K)`, optionally followed by GELU-tanh."""
    if plain(layer):
        return linear(x, layer.weight, layer.bias, gelu)
    y = layer(x)
    return F.gelu(y, approximate="tanh") if gelu else y


class FusedLinears:
    """Some layers that read the same input, as one product.

    Without gradients their parameters become (and stay) views of one storage: state dicts,
    optimizers and in-place updates do not notice, and nothing is copied. With gradients, and while
    a compiler traces, they are concatenated, which autograd splits again.
    """

    def __init__(self) -> None:
        self.whole: tuple[Tensor | None, Tensor | None] = (None, None)

    def apply(self, layers: Sequence[Any], x: Tensor) -> Tensor:
        """All results side by side, `(T, sum N)`."""
        if not all(map(plain, layers)):
            return torch.cat([layer(x) for layer in layers], dim=-1)
        weights, biases = _parameters(layers)
        if torch.compiler.is_compiling() or (
            torch.is_grad_enabled() and any(p.requires_grad for p in (*weights, *biases))
        ):
            return linear(x, torch.cat(weights), torch.cat(biases) if biases else None)
        return linear(x, *self.fuse(layers))

    def fuse(self, layers: Sequence[Any]) -> tuple[Tensor, Any]:
        """Weights `(sum N, K)` and biases `(sum N,)`, or None for layers without."""
        weights, biases = _parameters(layers)
        weight, bias = self.whole
        self.whole = _fuse(weights, weight), _fuse(biases, bias) if biases else None
        return self.whole


def _parameters(layers: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights, and biases: of all layers, or of none."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return [layer.weight for layer in layers], biases


def _fuse(parameters: Sequence[Tensor], whole: Tensor | None) -> Tensor:
    """One tensor of which the parameters are consecutive slices along their first dimension.

    `whole` is what an earlier call returned: given back if the parameters still lie in it, so that
    in-place updates are seen without a copy. Otherwise (first call, moved, cast, newly assigned)
    the parameters are laid into a new one; they stay the same objects with the same names.
    """
    if whole is not None and _lie_in(whole, parameters):
        return whole
    with torch.inference_mode(False), torch.no_grad():  # they may be trained later
        whole = torch.cat([p.detach() for p in parameters])
        parts = whole.split([p.shape[0] for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data = part
    return whole


def _lie_in(whole: Tensor, parameters: Sequence[Tensor]) -> bool:
    address = whole.data_ptr()
    for p in parameters:
        if p.data_ptr() != address or p.dtype != whole.dtype or p.device != whole.device:
            return False
        address += p.nbytes
    return address == whole.data_ptr() + whole.nbytes
