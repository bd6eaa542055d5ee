"""CosyVoice2's encoder: lookahead, conformer blocks, two frames a token, more blocks.

Its conformer has attention over relative positions and an MLP; no convolution module, one MLP a
block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imf_kernels import masks
from imf_kernels.models.lookahead import CausalConv1d, Lookahead, Past, Tail


class Span(NamedTuple):
    """Which of n positions attends to which of m, and how far they are apart."""

    distances: Tensor
    """Float32 `(R,)`, ascending: query minus key position, those that no earlier span had."""
    place: Tensor
    """Where among all distances that of query i and key j stands, `(n, m)`."""
    mask: Tensor | None
    """Whether query i sees key j, `(B, n, m)`, or `(B, 1, m)` for all queries; None: it does."""

    @staticmethod
    def whole(lengths: Tensor, count: int, chunk: int | None) -> Span:
        """All positions of rows of these lengths; with `chunk`, none sees beyond its own chunk."""
        position = torch.arange(count, device=lengths.device)
        place = position[:, None] - position + count - 1
        mask = masks.inside(lengths, count)[:, None]
        if chunk is not None:
            mask = mask & (position < (position[:, None] // chunk + 1) * chunk)
        return Span(torch.arange(1.0 - count, count, device=lengths.device), place, mask)

    @staticmethod
    def part(start: int, count: int, chunk: int, device: torch.device) -> Span:
        """The positions from `start` on, at most a chunk, which see themselves and all before."""
        end = start + count
        query, key = torch.arange(start, end, device=device), torch.arange(end, device=device)
        first = start if start else 1 - chunk
        distances = torch.arange(float(first), end, device=device)
        return Span(distances, query[:, None] - key + chunk - 1, None)


class Store:
    """Keys or values `(1, heads, ., head_dim)` of all positions so far."""

    def __init__(self, like: Tensor, heads: int, positions: int) -> None:
        self.values = like.new_empty(1, heads, positions, like.shape[0] // heads)
        self.filled = 0

    def extend(self, new: Tensor) -> Tensor:
        before, self.filled = self.filled, self.filled + new.shape[2]
        self.values[:, :, before : self.filled] = new
        return self.values[:, :, : self.filled]


class RelativeAttention(nn.Module):
    """Self-attention with keys of content and keys of distance (Transformer-XL)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.linear_q = nn.Linear(dim, dim)
        self.linear_k = nn.Linear(dim, dim)
        self.linear_v = nn.Linear(dim, dim)
        self.linear_out = nn.Linear(dim, dim)
        self.linear_pos = nn.Linear(dim, dim, bias=False)
        self.pos_bias_u = nn.Parameter(torch.zeros(heads, dim // heads))
        self.pos_bias_v = nn.Parameter(torch.zeros(heads, dim // heads))

    def forward(self, x: Tensor, encodings: Tensor, span: Span, past: Past | None) -> Tensor:
        """`(B, n, dim)` and the encoded distances `(1, R, dim)` to `(B, n, dim)`."""
        q, k, v = map(self._by_head, (self.linear_q(x), self.linear_k(x), self.linear_v(x)))
        p = self._by_head(self.linear_pos(encodings))
        if past is not None:
            k, v, p = (kept.extend(new) for kept, new in zip(past[self], (k, v, p), strict=True))
        by_distance = (q + self.pos_bias_v[:, None]) @ p.mT
        bias = by_distance.take_along_dim(span.place[None, None], dim=-1) * q.shape[-1] ** -0.5
        if span.mask is not None:
            bias = bias.masked_fill(~span.mask[:, None], -math.inf)
        q = q + self.pos_bias_u[:, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.linear_out(y.transpose(1, 2).flatten(2))

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def stores(self, positions: int, chunk: int) -> list[Store]:
        """For keys, values and the keys of distances."""
        sizes = (positions, positions, positions + chunk - 1)
        return [Store(self.linear_k.weight, self.heads, size) for size in sizes]


class FeedForward(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(dim, inner)
        self.w_2 = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(F.silu(self.w_1(x)))


class ConformerBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm, on a residual."""

    def __init__(self, dim: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm_mha = nn.LayerNorm(dim, eps=1e-12)
        self.self_attn = RelativeAttention(dim, heads)
        self.norm_ff = nn.LayerNorm(dim, eps=1e-12)
        self.feed_forward = FeedForward(dim, inner)

    def forward(self, x: Tensor, encodings: Tensor, span: Span, past: Past | None) -> Tensor:
        x = x + self.self_attn(self.norm_mha(x), encodings, span, past)
        return x + self.feed_forward(self.norm_ff(x))


class Embed(nn.Module):
    """What stands before each run of blocks: Linear and LayerNorm, scaled."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x) * math.sqrt(x.shape[-1])


class Upsample(nn.Module):
    """Every position `rate` times, then a convolution looking back."""

    def __init__(self, dim: int, rate: int) -> None:
        super().__init__()
        self.rate = rate
        self.conv = CausalConv1d(dim, dim, 2 * rate + 1)

    def forward(self, x: Tensor, past: Past | None) -> Tensor:
        return self.conv(x.repeat_interleave(self.rate, dim=1).mT, past).mT


class UpsampleConformer(nn.Module):
    """Embedded tokens to features of two frames each."""

    def __init__(
        self, dim: int, heads: int, inner: int, blocks: int, up_blocks: int, ahead: int, rate: int
    ) -> None:
        super().__init__()
        self.embed = Embed(dim)
        self.pre_lookahead_layer = Lookahead(dim, dim, ahead)
        self.encoders = nn.ModuleList(ConformerBlock(dim, heads, inner) for _ in range(blocks))
        self.up_layer = Upsample(dim, rate)
        self.up_embed = Embed(dim)
        self.up_encoders = nn.ModuleList(
            ConformerBlock(dim, heads, inner) for _ in range(up_blocks)
        )
        self.after_norm = nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, count: int, span: Callable[[int], Span], past: Past | None = None
    ) -> Tensor:
        """The first `count` of tokens that have passed `embed`, to `(B, rate * count, dim)`.

        `span(n)` says what attends to what where a token is n positions.
        """
        x = self.pre_lookahead_layer(x, count, past)
        x = _attend(self.encoders, x, span(1), past)
        x = self.up_embed(self.up_layer(x, past))
        return self.after_norm(_attend(self.up_encoders, x, span(self.up_layer.rate), past))

    def past(self, tokens: int, chunk: int) -> Past:
        """Room for a row of so many tokens, given at most a chunk at a time."""
        convs: Any = self.pre_lookahead_layer.conv2, self.up_layer.conv
        past: dict[nn.Module, Any] = {conv: [Tail(conv)] for conv in convs}
        for rate, blocks in ((1, self.encoders), (self.up_layer.rate, self.up_encoders)):
            for block in blocks:
                attention: Any = block.self_attn
                past[attention] = attention.stores(rate * tokens, rate * chunk)
        return past


def _attend(blocks: nn.ModuleList, x: Tensor, span: Span, past: Past | None) -> Tensor:
    encodings = sinusoids(span.distances, x.shape[-1]).to(x.dtype)[None]
    for block in blocks:
        x = block(x, encodings, span, past)
    return x


def sinusoids(distances: Tensor, dim: int) -> Tensor:
    """Float32 `(R,)` to `(R, dim)`: sin and cos by turns, their wavelengths from 2 pi to 1e4."""
    steps = torch.arange(0, dim, 2, dtype=torch.float32, device=distances.device)
    angles = distances[:, None] * torch.exp(steps * (-math.log(10000.0) / dim))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
