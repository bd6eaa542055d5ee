"""What every objective trains on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from imf_kernels import checks, masks


@dataclass(frozen=True)
class Batch:
    """Mels with their conditions.

    Attributes:
        x1: Data, normalised mels, float32 `(B, N, C)`; beyond a row's length anything finite.
        lengths: Frames per row, integer `(B,)`.
        conditions: The arguments of the model's `prepare` other than `lengths`: prompt, text, ...
        loss_mask: Frames that count in the loss, bool `(B, N)`: the span to infill, the frames
            after the prompt. None: all valid frames.
    """

    x1: Tensor
    lengths: Tensor
    conditions: Mapping[str, Any] = field(default_factory=dict)
    loss_mask: Tensor | None = None

    def __post_init__(self) -> None:
        checks.state("x1", self.x1)
        rows, frames, _ = self.x1.shape
        checks.lengths("lengths", self.lengths, rows, frames)
        checks.same_device("lengths", self.lengths, self.x1.device)
        checks.same_device("loss_mask", self.loss_mask, self.x1.device)
        if "lengths" in self.conditions:
            raise ValueError("conditions: expected no `lengths` beside the batch's own, got some")
        if self.loss_mask is not None:
            checks.shape("loss_mask", self.loss_mask, rows, frames)
            checks.dtype("loss_mask", self.loss_mask, torch.bool)

    def valid(self) -> Tensor:
        """Frames within the rows' lengths, bool `(B, N)`."""
        return masks.inside(self.lengths, self.x1.shape[1])

    def counted(self, region: str) -> Tensor:
        """Frames that count in the loss, bool `(B, N)`: of the "span" (`loss_mask`), or "all"."""
        if region == "span" and self.loss_mask is not None:
            return self.valid() & self.loss_mask
        return self.valid()
