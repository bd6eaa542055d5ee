"""Where a frame stands: the grouped position convolutions and rotary angles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KERNEL, GROUPS = 31, 16


def _grouped_conv(dim: int, padding: int = 0) -> nn.Conv1d:
    return nn.Conv1d(dim, dim, KERNEL, groups=GROUPS, padding=padding)


class ConvPositionEmbedding(nn.Module):
    """Two grouped convolutions with Mish over `(R, N, dim)`, seeing both sides (F5-TTS).

    Frames outside the mask are zero before each convolution, as if the row stood alone.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        first, second = (_grouped_conv(dim, KERNEL // 2) for _ in range(2))
        self.conv1d = nn.Sequential(first, nn.Mish(), second, nn.Mish())

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        inside = inside[:, None]
        first, mish, second, _ = self.conv1d
        h = mish(first(x.transpose(1, 2) * inside)) * inside
        return (mish(second(h)) * inside).transpose(1, 2)


class CausalConvPositionEmbedding(nn.Module):
    """The same, each convolution padded on the left (CosyVoice3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(_grouped_conv(dim), nn.Mish())
        self.conv2 = nn.Sequential(_grouped_conv(dim), nn.Mish())

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        inside = inside[:, None]
        left = (KERNEL - 1, 0)
        h = self.conv1(F.pad(x.transpose(1, 2) * inside, left)) * inside
        return (self.conv2(F.pad(h, left)) * inside).transpose(1, 2)


class RotaryEmbedding(nn.Module):
    """Rotary angles, never in less than float32.

    `inv_freq` keeps its place in the clients' state dicts, but is always computed anew: in half
    precision, cast or loaded, the angles would be off by .3 rad within 700 frames.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.register_buffer("inv_freq", None)
        self._restore(None)

    def _restore(self, device: torch.device | None) -> None:
        k = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device)
        self.inv_freq = 1.0 / (1e4 ** (k / self.head_dim))

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryEmbedding:
        super()._apply(fn, recurse)
        self._restore(self.inv_freq.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._restore(self.inv_freq.device)

    def forward(self, frames: int) -> Tensor:
        """`(frames, head_dim)` float32: cosines of the angles, then sines."""
        n = torch.arange(frames, device=self.inv_freq.device, dtype=torch.float64)
        angles = torch.outer(n, self.inv_freq.double())  # in float32 1e-4 rad off at 3,000 frames
        return torch.cat([angles.cos(), angles.sin()], dim=-1).float()
