"""F5-TTS's text tower: characters spread to frames, then ConvNeXtV2 blocks (arXiv 2410.06885)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imf_kernels.models import linears
from imf_kernels.models.config import TextConfig


def sinusoidal_positions(frames: int, dim: int, device: torch.device) -> Tensor:
    """`cos | sin (n / 1e4^(2k / dim))`, float32 `(frames, dim)`."""
    k = torch.arange(0, dim, 2, device=device, dtype=torch.float32)[: dim // 2]
    n = torch.arange(frames, device=device, dtype=torch.float32)
    angles = torch.outer(n, 1.0 / (1e4 ** (k / dim)))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class GlobalResponseNorm(nn.Module):
    """`x + gamma (x G / mean(G)) + beta`, G the L2 norm of a channel over the row's frames.

    (ConvNeXt V2, arXiv 2301.00808.) Frames beyond the row's duration do not enter G.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, dim))

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(x * inside, dim=1, keepdim=True)
        response = norms / (norms.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (x * response) + self.beta + x


class ConvNeXtV2Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 2 * dim)
        self.grn = GlobalResponseNorm(2 * dim)
        self.pwconv2 = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        h = self.dwconv(x.transpose(1, 2)).transpose(1, 2)
        h = linears.apply(self.pwconv1, self.norm(h).flatten(0, 1)).view(*x.shape[:2], -1)
        h = self.grn(F.gelu(h), inside)
        return x + linears.apply(self.pwconv2, h.flatten(0, 1)).view_as(x)


class TextTower(nn.Module):
    """Ids `(B, L)` (padding -1) to text features `(B, N, dim)`.

    Text beyond a row's duration is cut, the filler continues the text up to the duration, and
    beyond it everything is zero: a padded buffer gives a row what it gets alone.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_embed = nn.Embedding(config.vocab + 1, config.dim)
        self.text_blocks = nn.ModuleList(ConvNeXtV2Block(config.dim) for _ in range(config.layers))

    def forward(self, text: Tensor, frames: int, inside: Tensor, *, drop: bool) -> Tensor:
        """`inside`: bool `(B, N)`, the row's frames. `drop`: every id becomes the filler; the mask
        of v1 still follows the undropped text, as in the teacher's training."""
        ids = F.pad(text[:, :frames] + 1, (0, max(frames - text.shape[1], 0)))
        kept = inside & (ids != 0) if self.config.mask_padding else inside
        kept, inside = kept[:, :, None], inside[:, :, None]
        x = self.text_embed(torch.zeros_like(ids) if drop else ids)
        if not self.text_blocks:
            return x * inside
        x = x + sinusoidal_positions(frames, self.config.dim, x.device).to(x.dtype)
        x = x * kept
        for block in self.text_blocks:
            x = block(x, inside) * kept
        return x
