"""What CosyVoice2's U-Net is made of: causal convolution blocks and transformer blocks.

Frames `(T, C)` of rows: convolutions look back within a row, attention stays within it, all else is
of each frame alone. So nothing of the frames of no row reaches another: no mask is applied between
the blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imf_kernels.models import linears
from imf_kernels.models.config import CausalUNetConfig
from imf_kernels.models.linears import FusedLinears
from imf_kernels.models.scope import Scope
from imf_kernels.ops import (
    causal_conv,
    causal_conv_norm,
    linear,
    residual_layer_norm,
)
from imf_kernels.rows import Rows


class CausalConv(nn.Conv1d):
    """A convolution of each frame and the `taps - 1` before it in its row."""

    def __init__(self, channels_in: int, channels_out: int, taps: int) -> None:
        super().__init__(channels_in, channels_out, taps)

    def forward(self, x: Tensor, scope: Scope) -> Tensor:  # type: ignore[override]
        """`(T, channels_in)` to `(T, channels_out)`."""
        x = scope.preceded(x) if self.kernel_size[0] > 1 else x
        return self.over(x, slice(None), self.bias, scope.rows)

    def over(self, x: Tensor, columns: slice, bias: Tensor | None, rows: Rows) -> Tensor:
        """The share of some input channels, of which `x` holds the values, and a bias."""
        weight = self.weight[:, columns]
        if weight.shape[2] == 1:
            return linear(x, weight[:, :, 0], bias)
        return causal_conv(x, weight, bias, rows)


class ConvBlock(nn.Module):
    """Convolution, LayerNorm over channels, Mish."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            CausalConv(channels_in, channels_out, 3),
            nn.Identity(),  # the clients' transposition
            nn.LayerNorm(channels_out),
        )

    @property
    def conv(self) -> Any:
        return self.block[0]

    def forward(
        self,
        x: Tensor,
        scope: Scope,
        *,
        conditions: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """`(T, channels_in)` to `(T, channels_out)`, plus what is given.

        `conditions` are the share of the last input channels, and of the bias, where `x` holds the
        first ones only.
        """
        norm: Any = self.block[2]
        return causal_conv_norm(
            scope.preceded(x),
            linears.weight_of(self.conv)[:, : x.shape[1]],
            self.conv.bias if conditions is None else None,
            norm.weight,
            norm.bias,
            scope.rows,
            addend=conditions,
            shift=shift,
            residual=residual,
            eps=norm.eps,
        )


class ResnetBlock(nn.Module):
    """Two convolution blocks on a projected residual; the time embedding shifts what lies between.

    The shift, `mlp` of the embedding, is given: it is all that depends on `(t, r)`.
    """

    def __init__(self, channels_in: int, config: CausalUNetConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Mish(), nn.Linear(config.time_dim, config.dim))
        self.block1 = ConvBlock(channels_in, config.dim)
        self.block2 = ConvBlock(config.dim, config.dim)
        self.res_conv = CausalConv(channels_in, config.dim, 1)

    def forward(
        self, x: Tensor, shift: Tensor, scope: Scope, conditions: Tensor | None = None
    ) -> Tensor:
        """`(T, channels_in)` and `(R, dim)`, or `(1, dim)` for all rows, to `(T, dim)`.

        `conditions` `(T, 2 dim)` are the share of the last input channels in the two convolutions
        that read the block's input, where `x` holds the first ones only.
        """
        if conditions is None:
            h, residual = self.block1(x, scope, shift=shift), self.res_conv(x, scope)
        else:
            of_h, of_residual = conditions.chunk(2, dim=1)
            h = self.block1(x, scope, conditions=of_h, shift=shift)
            residual = of_residual + self.res_conv.over(x, slice(x.shape[1]), None, scope.rows)
        return self.block2(h, scope, residual=residual)

    def conditions(self, x: Tensor, rows: Rows) -> Tensor:
        """`conditions` of the forward pass, from the values of the last input channels."""
        convs = self.block1.conv, self.res_conv
        return torch.cat([c.over(x, slice(-x.shape[1], None), c.bias, rows) for c in convs], dim=1)


class Attention(nn.Module):
    """Self-attention over each row's frames."""

    def __init__(self, config: CausalUNetConfig) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.to_q = nn.Linear(config.dim, inner, bias=False)
        self.to_k = nn.Linear(config.dim, inner, bias=False)
        self.to_v = nn.Linear(config.dim, inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, config.dim)])
        self._fused = FusedLinears()

    def forward(self, x: Tensor, scope: Scope) -> Tensor:
        """`(T, dim)` to `(T, dim)`."""
        qkv = self._fused.apply(self.projections, x).unflatten(-1, (3, self.heads, -1))
        return linears.apply(self.to_out[0], scope.attend(qkv).flatten(1))

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        return self.to_q, self.to_k, self.to_v

    def fuse_weights(self) -> None:
        if all(map(linears.plain, self.projections)):
            self._fused.fuse(self.projections)


class Widening(nn.Module):
    """Linear and exact GELU."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(linears.apply(self.proj, x))


class FeedForward(nn.Module):
    def __init__(self, config: CausalUNetConfig) -> None:
        super().__init__()
        inner = config.ff_mult * config.dim
        self.net = nn.ModuleList(
            [
                Widening(config.dim, inner),
                nn.Identity(),  # the clients' dropout, which a velocity model does not use
                nn.Linear(inner, config.dim),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return linears.apply(self.net[2], self.net[0](x))


class TransformerBlock(nn.Module):
    """Attention and MLP, each behind an affine LayerNorm, on a residual."""

    def __init__(self, config: CausalUNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim)
        self.attn1 = Attention(config)
        self.norm3 = nn.LayerNorm(config.dim)
        self.ff = FeedForward(config)

    def forward(self, x: Tensor, y: Tensor, following: Any, scope: Scope) -> tuple[Tensor, Tensor]:
        """From the residual stream `x` `(T, dim)` and its norm `y` to the same after this block.

        `following` is the norm of the block after this one; None: the norm is not read.
        """
        x, y = _residual_norm(x, self.attn1(y, scope), self.norm3)
        h = self.ff(y)
        return (x + h, y) if following is None else _residual_norm(x, h, following)


def _residual_norm(x: Tensor, h: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    return residual_layer_norm(x, h, norm.weight, norm.bias, norm.eps)


class Stage(nn.ModuleList):
    """A ResNet block and the transformer blocks after it; the outer stages' own convolution last.

    A list, for the clients' names.
    """

    def __init__(self, channels_in: int, config: CausalUNetConfig, *, outer: bool = False) -> None:
        blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.depth))
        super().__init__([ResnetBlock(channels_in, config), blocks])
        if outer:
            self.append(CausalConv(config.dim, config.dim, 3))

    @property
    def resnet(self) -> Any:
        return self[0]

    @property
    def conv(self) -> Any:
        return self[2]

    def forward(
        self,
        x: Tensor,
        shift: Tensor,
        scope: Scope,
        conditions: Tensor | None = None,
    ) -> Tensor:
        """`(T, channels_in)` to `(T, dim)`, without the outer convolution."""
        x = self.resnet(x, shift, scope, conditions)
        blocks: Any = self[1]
        norms = [*(block.norm1 for block in blocks), None]
        y = norms[0](x)
        for block, following in zip(blocks, norms[1:], strict=True):
            x, y = block(x, y, following, scope)
        return x
