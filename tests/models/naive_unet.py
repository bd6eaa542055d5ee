"""CosyVoice2's estimator written out plainly from a state dict: what ours is compared with.

As upstream, channels come before frames, conditions are concatenated and convolved at every call,
masks are multiplied in and attention takes an additive mask. The time embedding stays in float32
(or float64), for a fair comparison in half precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


class NaiveUNet:
    def __init__(self, weights: Mapping[str, Tensor], heads: int, chunk: int | None = None) -> None:
        self.weights, self.heads, self.chunk = weights, heads, chunk

    def __call__(self, x: Tensor, mask: Tensor, t: Tensor, mu: Tensor, spks: Tensor, cond: Tensor):
        """`(B, C, N)`, mask `(B, 1, N)`, t and spks `(B,)` and `(B, C)`, to `(B, C, N)`."""
        h = torch.cat([x, mu, spks[:, :, None].expand_as(x), cond], dim=1)
        e = F.mish(self.time(t, h.shape[1]))
        bias = self.bias(mask)
        skip = h = self.stage("down_blocks.0", h, mask, e, bias)
        h = self.conv("down_blocks.0.2", h * mask)
        for i in range(self.count("mid_blocks.")):
            h = self.stage(f"mid_blocks.{i}", h, mask, e, bias)
        h = self.stage("up_blocks.0", torch.cat([h, skip], dim=1), mask, e, bias)
        h = self.conv("up_blocks.0.2", h * mask)
        h = self.conv_block("final_block", h, mask)
        return self.conv("final_proj", h * mask) * mask

    def time(self, t: Tensor, width: int) -> Tensor:
        k = torch.arange(width // 2, dtype=t.dtype)
        angles = 1000 * t[:, None] * torch.exp(-math.log(1e4) / (width // 2 - 1) * k)
        e = torch.cat([angles.sin(), angles.cos()], dim=-1)
        w = {k: v.to(t.dtype) for k, v in self.weights.items() if k.startswith("time_mlp")}
        e = F.linear(e, w["time_mlp.linear_1.weight"], w["time_mlp.linear_1.bias"])
        return F.linear(F.silu(e), w["time_mlp.linear_2.weight"], w["time_mlp.linear_2.bias"])

    def bias(self, mask: Tensor) -> Tensor:
        frames = torch.arange(mask.shape[-1])
        sees = mask.bool().expand(-1, mask.shape[-1], -1)
        if self.chunk is not None:
            sees = sees & (frames // self.chunk <= frames[:, None] // self.chunk)
        return torch.zeros(sees.shape, dtype=mask.dtype).masked_fill(~sees, -torch.inf)[:, None]

    def stage(self, name: str, x: Tensor, mask: Tensor, e: Tensor, bias: Tensor) -> Tensor:
        h = self.conv_block(f"{name}.0.block1", x, mask)
        h = h + self.linear(f"{name}.0.mlp.1", e.to(h.dtype))[:, :, None]
        h = self.conv_block(f"{name}.0.block2", h, mask) + self.conv(f"{name}.0.res_conv", x * mask)
        h = h.mT
        for i in range(self.count(f"{name}.1.")):
            block = f"{name}.1.{i}"
            h = h + self.attention(f"{block}.attn1", self.norm(f"{block}.norm1", h), bias)
            wide = F.gelu(self.linear(f"{block}.ff.net.0.proj", self.norm(f"{block}.norm3", h)))
            h = h + self.linear(f"{block}.ff.net.2", wide)
        return h.mT

    def conv_block(self, name: str, x: Tensor, mask: Tensor) -> Tensor:
        h = self.conv(f"{name}.block.0", x * mask)
        return F.mish(self.norm(f"{name}.block.2", h.mT).mT) * mask

    def attention(self, name: str, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            self.linear(f"{name}.to_{part}", x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in "qkv"
        )
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.linear(f"{name}.to_out.0", h.transpose(1, 2).flatten(2))

    def conv(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.conv1d(F.pad(x, (weight.shape[2] - 1, 0)), weight, self.weights[f"{name}.bias"])

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, eps=1e-5)

    def count(self, prefix: str) -> int:
        return len({k[len(prefix) :].split(".")[0] for k in self.weights if k.startswith(prefix)})
