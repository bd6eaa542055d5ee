"""F5-TTS's text tower: characters spread to frames, then ConvNeXtV2 blocks (arXiv 2410.06885)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imf_kernels.models import linears
from imf_kernels.models.config import TextConfig
from imf_kernels.ops import depthwise_conv_norm, grn_gelu
from imf_kernels.rows import Rows


def sinusoidal_positions(position: Tensor, dim: int) -> Tensor:
    """`cos | sin (n / 1e4^(2k / dim))` of positions `(T,)`, float32 `(T, dim)`."""
    k = torch.arange(0, dim, 2, device=position.device, dtype=torch.float32)[: dim // 2]
    angles = torch.outer(position.float(), 1.0 / (1e4 ** (k / dim)))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class GlobalResponseNorm(nn.Module):
    """The weights of `grn_gelu`, in the shapes of the clients' checkpoints."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, dim))

    def forward(self, h: Tensor, rows: Rows) -> Tensor:
        """Of `gelu(h)`, `(T, dim)`."""
        return grn_gelu(h, self.gamma.flatten(), self.beta.flatten(), rows)


class ConvNeXtV2Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 2 * dim)
        self.grn = GlobalResponseNorm(2 * dim)
        self.pwconv2 = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """`(T, dim)`, without the residual."""
        bias: Any = self.dwconv.bias
        norm = self.norm
        h = depthwise_conv_norm(
            x, linears.weight_of(self.dwconv), bias, norm.weight, norm.bias, rows, norm.eps
        )
        h = self.grn(linears.apply(self.pwconv1, h), rows)
        return linears.apply(self.pwconv2, h)


class TextTower(nn.Module):
    """Ids `(R, L)` (padding -1) to text features of R rows' frames.

    Text beyond a row's duration is cut, the filler continues the text up to the duration, and
    frames of no row are zero: a row gets among others what it gets alone.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_embed = nn.Embedding(config.vocab + 1, config.dim)
        self.text_blocks = nn.ModuleList(ConvNeXtV2Block(config.dim) for _ in range(config.layers))

    def forward(
        self, text: Tensor, rows: Rows, guided: bool, padding: Tensor | None = None
    ) -> Tensor:
        """`(branches, T, dim)`: with the text, and if `guided` also with the filler in its place.

        The mask of v1 follows the text in both, as in the teacher's training. `padding` `(T,)` are
        frames of rows that enter the blocks empty, as upstream has them.
        """
        row, position = rows.places()
        # the column behind the text is the filler's
        ids = F.pad(text + 1, (0, 1))[row, position.clamp(max=text.shape[1])]
        if padding is not None:
            ids = ids.masked_fill(padding, 0)
        kept = rows.row_of >= 0
        if self.text_blocks and self.config.mask_padding:
            kept = kept & (ids != 0)
        ids = torch.stack([ids, torch.zeros_like(ids)]) if guided else ids[None]
        x = self.text_embed(ids)
        mask = kept[:, None].to(x.dtype)
        if self.text_blocks:
            x = x + sinusoidal_positions(position, self.config.dim).to(x.dtype)
        x = x * mask
        if padding is not None:
            x = x.masked_fill(padding[:, None], 0.0)
        branches = rows.repeat(len(ids))
        for block in self.text_blocks:
            x = torch.addcmul(x, block(x.flatten(0, 1), branches).view_as(x), mask)
        return x
