"""CosyVoice's lookahead: every token sees a few tokens after it, once, before all else looks back.

What runs over a whole sequence runs over its parts as well, given `Past`: what the layers keep of
one row's earlier positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Kept(Protocol):
    """What a layer keeps of earlier positions, in memory that does not grow."""

    values: Tensor

    def extend(self, new: Tensor) -> Tensor:
        """The earlier values and the new ones, of which as many are kept as will be needed."""
        ...


Past = Mapping[nn.Module, Sequence[Kept]]
"""What each layer keeps."""


class Tail:
    """A causal convolution's last `taps - 1` inputs, zero before the first position."""

    def __init__(self, conv: nn.Conv1d) -> None:
        self.values = conv.weight.new_zeros(1, conv.in_channels, conv.kernel_size[0] - 1)

    def extend(self, new: Tensor) -> Tensor:
        joined = torch.cat([self.values, new], dim=2)
        self.values.copy_(joined[:, :, -self.values.shape[2] :])
        return joined


class CausalConv1d(nn.Conv1d):
    """A convolution of each position and the `taps - 1` before it."""

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """`(B, channels_in, L)` to `(B, channels_out, L)`."""
        if past is None:
            return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))
        (tail,) = past[self]
        return super().forward(tail.extend(x))


class Lookahead(nn.Module):
    """A convolution over each token and the `ahead` after it, one looking back, on a residual."""

    def __init__(self, dim: int, inner: int, ahead: int) -> None:
        super().__init__()
        self.ahead = ahead
        self.conv1 = nn.Conv1d(dim, inner, ahead + 1)
        self.conv2 = CausalConv1d(inner, dim, 3)

    def forward(self, x: Tensor, count: int, past: Past | None = None) -> Tensor:
        """The first `count` of the tokens `(B, L, dim)`, to `(B, count, dim)`.

        The others are context; where fewer than `ahead` of them are given, zeros follow.
        """
        following = F.pad(x.mT, (0, count + self.ahead - x.shape[1]))
        return x[:, :count] + self.conv2(F.leaky_relu(self.conv1(following)), past).mT
