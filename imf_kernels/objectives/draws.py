"""Random draws with an optional generator, which may live on another device than the result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def uniform(
    shape: Sequence[int], generator: torch.Generator | None, device: torch.device | None
) -> Tensor:
    """Float32 in [0, 1)."""
    source = generator.device if generator is not None else device
    return torch.rand(tuple(shape), generator=generator, device=source, dtype=torch.float32).to(
        device
    )


def normal_like(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal, `like`'s shape, dtype and device."""
    source = generator.device if generator is not None else like.device
    noise = torch.randn(like.shape, generator=generator, device=source, dtype=like.dtype)
    return noise.to(like.device)
