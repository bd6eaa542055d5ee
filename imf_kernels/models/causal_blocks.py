"""What CosyVoice2's U-Net is made of: causal convolution blocks and transformer blocks.

Every convolution looks back only and attention stays within a row, so nothing of the frames beyond
a row's length reaches a valid one: no mask is applied between the blocks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from imf_kernels.models import linears
from imf_kernels.models.config import CausalUNetConfig
from imf_kernels.models.linears import FusedLinears
from imf_kernels.ops import attention, linear
from imf_kernels.rows import Rows


class CausalConv(nn.Conv1d):
    """A convolution of each frame and the `taps - 1` before it, as one product over both."""

    def __init__(self, channels_in: int, channels_out: int, taps: int) -> None:
        super().__init__(channels_in, channels_out, taps)

    def forward(self, x: Tensor) -> Tensor:
        """`(R, N, channels_in)` to `(R, N, channels_out)`."""
        return self.over(x, slice(None), self.bias)

    def over(self, x: Tensor, columns: slice, bias: Tensor | None) -> Tensor:
        """The share of some input channels, of which `x` holds the values, and a bias."""
        weight = self.weight[:, columns].flatten(1)
        y = linear(_windows(x, self.kernel_size[0]), weight, bias)
        return y.view(*x.shape[:2], -1)


def _windows(x: Tensor, taps: int) -> Tensor:
    """Each frame with those before it, zeros before the first: `(R * N, C * taps)`.

    Channels come before taps, as in a convolution's weight, which is thus used as it lies.
    """
    if taps > 1:
        x = F.pad(x, (0, 0, taps - 1, 0)).unfold(1, taps, 1).flatten(2)
    return x.flatten(0, 1)


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

    def forward(self, x: Tensor) -> Tensor:
        return self.after_conv(self.conv(x))

    def after_conv(self, h: Tensor) -> Tensor:
        return F.mish(self.block[2](h))


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

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """`(R, N, channels_in)` and `(R, dim)`, or `(1, dim)` for all rows, to `(R, N, dim)`."""
        return self.after_conv(self.block1.conv(x), self.res_conv(x), shift)

    def after_conv(self, h: Tensor, residual: Tensor, shift: Tensor) -> Tensor:
        """The rest, from the results of the two convolutions that read the block's input."""
        h = self.block1.after_conv(h)
        return self.block2(h + shift[:, None].to(h.dtype)) + residual


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

    def forward(self, x: Tensor, rows: Rows, chunk: Tensor | None) -> Tensor:
        """`(T, dim)` to `(T, dim)`."""
        qkv = self._fused.apply(self.projections, x).unflatten(-1, (3, self.heads, -1))
        return linears.apply(self.to_out[0], attention(qkv, rows, chunk).flatten(1))

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

    def forward(self, x: Tensor, rows: Rows, chunk: Tensor | None) -> Tensor:
        """`(T, dim)` to `(T, dim)`."""
        x = x + self.attn1(self.norm1(x), rows, chunk)
        return x + self.ff(self.norm3(x))


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

    def forward(self, x: Tensor, shift: Tensor, rows: Rows, chunk: Tensor | None) -> Tensor:
        """`(R, N, channels_in)` to `(R, N, dim)`, without the outer convolution."""
        return self.after_resnet(self.resnet(x, shift), rows, chunk)

    def after_resnet(self, x: Tensor, rows: Rows, chunk: Tensor | None) -> Tensor:
        blocks: Any = self[1]
        h = x.flatten(0, 1)
        for block in blocks:
            h = block(h, rows, chunk)
        return h.view_as(x)
