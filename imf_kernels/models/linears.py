"""How models run their linear layers: through the op, and as one product where they share input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imf_kernels.dispatch import dual_level
from imf_kernels.ops.fp8_linear import MULTIPLE, fp8_linear
from imf_kernels.ops.linear import linear
from imf_kernels.ops.quantize_rows import FP8, Quantized, quantize_rows


def plain(layer: Any) -> bool:
    """Whether a layer is what it was built as: no adapter in its place, no hooks on it."""
    return type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks)


def weight_of(layer: Any) -> Tensor:
    """The weight of a layer that is read, not called.

    Raises:
        TypeError: an adapter in its place, which would do nothing.
    """
    if not isinstance(layer, nn.Linear | nn.Conv1d):
        got = f"{type(layer).__module__}.{type(layer).__name__}"
        raise TypeError(f"model: expected a plain layer, whose weight is read, got {got}")
    return layer.weight


def apply(layer: Any, x: Any, gelu: bool = False) -> Tensor:
    """`layer(x)` for `x` `(T, K)`, optionally followed by GELU-tanh."""
    if plain(layer):
        return linear(x, layer.weight, layer.bias, gelu)
    y = layer(x)
    return F.gelu(y, approximate="tanh") if gelu else y


class Fp8Linear(nn.Module):
    """A frozen linear layer in FP8: quantised once, with a scale per output channel.

    Its buffers are saved and loaded as they are; a float `weight` is quantised as it is loaded.
    They move with the model and are never cast. The product is in bfloat16.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        if in_features % MULTIPLE or out_features % MULTIPLE:
            raise ValueError(
                f"fp8: expected layers whose sizes are multiples of {MULTIPLE}, "
                f"got {in_features} to {out_features}"
            )
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=FP8))
        self.register_buffer("weight_scale", torch.ones(out_features, 1))
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.bfloat16))
        self.training = False

    def forward(self, x: Tensor | Quantized, gelu: bool = False) -> Tensor:
        """Bfloat16 `(T, N)`, of `x` `(T, K)` or, with `gelu`, of `gelu_tanh(x)`.

        What is not quantised yet is quantised here, in one pass with the GELU.
        """
        if not isinstance(x, Quantized):
            x = quantize_rows(x, gelu)
        return fp8_linear(x, Quantized(self.weight, self.weight_scale), self.bias)

    def train(self, mode: bool = True) -> Fp8Linear:
        if mode:
            raise RuntimeError(
                "an FP8 model is for inference: train the model that it was made from"
            )
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Fp8Linear:
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.dtype != FP8:
            q, scale = quantize_rows(weight.to(self.weight.device))
            state_dict = {**state_dict, prefix + "weight": q, prefix + "weight_scale": scale}
        super()._load_from_state_dict(state_dict, prefix, *args)


def new(in_features: int, out_features: int, fp8: bool) -> nn.Module:
    """A linear layer, in FP8 or not."""
    return (Fp8Linear if fp8 else nn.Linear)(in_features, out_features)


class FusedLinears:
    """Some layers that read the same input, as one product.

    Without gradients their parameters become (and stay) views of one storage: optimizers and
    in-place updates do not notice, state dicts hold copies, nothing else is copied. With gradients
    they are read there if they lie there already (`fuse`); elsewhere, and while a compiler traces,
    they are concatenated, which autograd splits again.
    """

    movable = True
    """False: the parameters stay where they lie, and are concatenated without gradients too."""

    def __init__(self) -> None:
        self.whole: tuple[Tensor | None, Tensor | None] = (None, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedLinears:
        """Of a copy's parameters nothing is known yet; the storage would be held twice."""
        return FusedLinears()

    def __getstate__(self) -> dict[str, Any]:
        return {"whole": (None, None)}

    def apply(self, layers: Sequence[Any], x: Tensor) -> Tensor:
        """All results side by side, `(T, sum N)`."""
        if not all(map(plain, layers)):
            return torch.cat([layer(x) for layer in layers], dim=-1)
        weights, biases = _parameters(layers)
        if torch.compiler.is_compiling() or (
            torch.is_grad_enabled() and any(p.requires_grad for p in (*weights, *biases))
        ):
            one = _AsOne.apply if self.fused(layers) else _concatenated
            weight, bias = self.whole
            return linear(x, one(weight, *weights), one(bias, *biases) if biases else None)
        return linear(x, *self.fuse(layers))

    def fused(self, layers: Sequence[Any]) -> bool:
        """Whether the layers' own parameters lie in one storage, so that autograd may read it."""
        if torch.compiler.is_compiling() or not all(map(plain, layers)):
            return False
        if torch._C._functorch.peek_interpreter_stack() is not None or dual_level():
            return False
        both = zip(self.whole, _parameters(layers), strict=True)
        return self.whole[0] is not None and all(
            whole is None
            if not parameters
            else whole is not None
            and all(type(p) is nn.Parameter for p in parameters)
            and _lie_in(whole, parameters)
            for whole, parameters in both
        )

    def fuse(self, layers: Sequence[Any]) -> tuple[Tensor, Any]:
        """Weights `(sum N, K)` and biases `(sum N,)`, or None for layers without."""
        weights, biases = _parameters(layers)
        if not self.movable:
            self.whole = None, None
            return torch.cat(weights), torch.cat(biases) if biases else None
        weight, bias = self.whole
        self.whole = _fuse(weights, weight), _fuse(biases, bias) if biases else None
        return self.whole


class _AsOne(torch.autograd.Function):
    """The storage that parameters lie in, as what they would be concatenated."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, *parameters: Tensor) -> Tensor:
        ctx.sizes = [p.shape[0] for p in parameters]
        ctx.parameters = parameters
        ctx.versions = [p._version for p in parameters]
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if [p._version for p in ctx.parameters] != ctx.versions:
            raise RuntimeError(
                "a weight needed for the gradient has been modified by an in-place operation"
            )
        return None, *grad.split(ctx.sizes)


def _concatenated(whole: Tensor | None, *parameters: Tensor) -> Tensor:
    return torch.cat(parameters)


def _parameters(layers: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights, and biases: of all layers, or of none."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return [weight_of(layer) for layer in layers], biases


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
