"""The models as plain PyTorch has them, same weights: what this library is measured against.

DiT: position convolutions, three projections, rotary positions in float32, LayerNorm and modulation
in the model's dtype. CausalUNet: causal convolutions, LayerNorm and Mish one after the other. Both
with scaled_dot_product_attention, all rows side by side in padding. `imf_kernels.backend` decides
the rest (Euler step, loss), so contenders run `plainly`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import imf_kernels
from imf_kernels import masks
from imf_kernels.models import CausalUNet, Conditioning, DiT
from imf_kernels.models.dit import Block
from imf_kernels.models.estimator import Estimator
from imf_kernels.models.positions import CausalConvPositionEmbedding, GroupedConv
from imf_kernels.models.scope import Scope
from imf_kernels.models.step_tables import Modulation
from imf_kernels.rows import Rows


class PlainDiT(DiT):
    masked = True
    """Whether rows have lengths of their own: without a mask attention has faster kernels."""

    def velocity(
        self,
        x: Tensor,
        conditions: Tensor,
        modulation: Modulation,
        rows: Rows,
        cond: Conditioning,
    ) -> Tensor:
        h = (self.input_embed.state(x) + conditions).flatten(0, 1)
        inside = masks.inside(rows.lengths, rows.longest) if self.masked else None
        rowwise = h.unflatten(0, (-1, rows.longest))
        h = h + _positions(self.input_embed.conv_pos_embed, rowwise, inside)
        return self.proj_out(self._plain_blocks(h, modulation, rows, cond))

    def _plain_blocks(
        self, h: Tensor, modulation: Modulation, rows: Rows, cond: Conditioning
    ) -> Tensor:
        x = h.unflatten(0, (rows.lengths.shape[0], rows.longest))
        mask = None
        if self.masked:
            mask = masks.inside(rows.lengths, rows.longest)[:, None, None]
        for block, own in zip(self.transformer_blocks, modulation.blocks, strict=True):
            arguments = (block, x, own.to(x.dtype), cond["rope"], mask)
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(_block, *arguments, use_reentrant=False)
            else:
                x = _block(*arguments)
        scale, shift = modulation.final.to(x.dtype).unbind(1)
        return _norm(x, shift, scale).flatten(0, 1)


class PlainUNet(CausalUNet):
    masked = True

    def _evaluate(
        self, x: Tensor, conditions: Tensor, modulation: Modulation, scope: Scope
    ) -> Tensor:
        rows = scope.rows
        x, given = (each.unflatten(0, (-1, rows.longest)) for each in (x, conditions))
        mask = masks.inside(rows.lengths, rows.longest)[:, None, None] if self.masked else None
        first, *between, last = (shift.to(x.dtype) for shift in modulation.blocks)
        skip = _stage(self._down, x, first, mask, given)
        h = _conv(self._down.conv, skip)
        for stage, shift in zip(self.mid_blocks, between, strict=True):
            h = _stage(stage, h, shift, mask)
        h = _stage(self._up, torch.cat([h, skip], dim=-1), last, mask)
        h = _conv_block(self.final_block, _conv(self._up.conv, h))
        return _conv(self.final_proj, h).flatten(0, 1)


PLAIN: dict[type[Estimator], type[Estimator]] = {DiT: PlainDiT, CausalUNet: PlainUNet}


def plain(model: Estimator, masked: bool = True) -> Any:
    """A copy of the model, its blocks in plain PyTorch."""
    twin: Any = copy.deepcopy(model)
    twin.__class__ = PLAIN[type(model)]
    twin.masked = masked
    return twin


def plainly(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` without any kernel of this library."""

    @functools.wraps(run)
    def inner(*args: Any, **kwargs: Any) -> Any:
        with imf_kernels.backend("reference"):
            return run(*args, **kwargs)

    return inner


class Compiled:
    """A model for `sampler.sample`, which evaluates it from its step tables, under torch.compile.

    (`torch.compile(model)` compiles `forward` alone.)
    """

    def __init__(self, model: Any, backend: str = "inductor") -> None:
        self.dtype, self.tables, self.lay_out = model.dtype, model.tables, model.lay_out
        self.evaluate = torch.compile(model.evaluate, dynamic=False, backend=backend)


def _positions(embed: Any, x: Tensor, inside: Tensor | None) -> Tensor:
    """Both position convolutions of `x` `(R, N, D)`, frames of no row 0: `(R * N, D)`."""
    convs = [conv for conv in embed.modules() if isinstance(conv, GroupedConv)]
    causal = isinstance(embed, CausalConvPositionEmbedding)
    h = x.transpose(1, 2)
    for conv in convs:
        if inside is not None:
            h = h * inside[:, None]
        taps = conv.weight.shape[2]
        h = F.pad(h, (taps - 1, 0) if causal else (taps // 2, taps // 2))
        h = F.mish(F.conv1d(h, conv.weight, conv.bias, groups=conv.groups))
    return h.transpose(1, 2).flatten(0, 1)


def _block(
    block: Block, x: Tensor, modulation: Tensor, rope: Tensor, mask: Tensor | None
) -> Tensor:
    """`x` `(R, N, D)`, `modulation` `(R or 1, 6, D)`."""
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation.unbind(1)
    attn: Any = block.attn
    y = _norm(x, shift_a, scale_a)
    q, k, v = (
        layer(y).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
    )
    q, k = _rotated(q, rope, attn.rope_heads), _rotated(k, rope, attn.rope_heads)
    heads = (part.transpose(1, 2) for part in (q, k, v))
    h = F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2)
    x = x + gate_a[:, None] * attn.to_out[0](h)
    return x + gate_f[:, None] * block.ff.ff(_norm(x, shift_f, scale_f))


def _norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def _rotated(x: Tensor, rope: Tensor, heads: int | None) -> Tensor:
    """`x` `(R, N, H, head_dim)`; interleaved pairs of the first heads."""
    heads = x.shape[2] if heads is None else heads
    cos, sin = rope[:, None].chunk(2, dim=-1)
    even, odd = x[:, :, :heads].float().unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    turned = pairs.flatten(-2).to(x.dtype)
    return turned if heads == x.shape[2] else torch.cat([turned, x[:, :, heads:]], dim=2)


def _stage(
    stage: Any, x: Tensor, shift: Tensor, mask: Tensor | None, given: Tensor | None = None
) -> Tensor:
    """`x` `(R, N, C)`; `given` is the other input channels' share in the first convolutions."""
    of_h, of_residual = (None, None) if given is None else given.chunk(2, dim=-1)
    resnet = stage.resnet
    h = _conv_block(resnet.block1, x, of_h) + shift[:, None]
    h = _conv_block(resnet.block2, h) + _conv(resnet.res_conv, x, of_residual)
    for block in stage[1]:
        attn, y = block.attn1, block.norm1(h)
        q, k, v = (layer(y).unflatten(-1, (attn.heads, -1)) for layer in attn.projections)
        heads = (part.transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(*heads, attn_mask=mask)
        h = h + attn.to_out[0](y.transpose(1, 2).flatten(2))
        widening, _, narrowing = block.ff.net
        h = h + narrowing(F.gelu(widening.proj(block.norm3(h))))
    return h


def _conv_block(block: Any, x: Tensor, given: Tensor | None = None) -> Tensor:
    return F.mish(block.block[2](_conv(block.conv, x, given)))


def _conv(conv: Any, x: Tensor, given: Tensor | None = None) -> Tensor:
    """Over each frame and those before it; `given` has the bias in it."""
    weight = conv.weight[:, : x.shape[-1]]
    h = F.pad(x.transpose(1, 2), (weight.shape[2] - 1, 0))
    if given is None:
        return F.conv1d(h, weight, conv.bias).transpose(1, 2)
    return F.conv1d(h, weight).transpose(1, 2) + given
