"""Which frames belong to a row."""

from __future__ import annotations

import torch
from torch import Tensor


def inside(lengths: Tensor, frames: int) -> Tensor:
    """Frames before each row's length: bool `(B, frames)`, for lengths `(B,)`."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]
