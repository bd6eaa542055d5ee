"""What every objective trains on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        names: The rows' names, for reports; or none.
    """

    x1: Tensor
    lengths: Tensor
    conditions: Mapping[str, Any] = field(default_factory=dict)
    loss_mask: Tensor | None = None
    names: tuple[str, ...] = ()

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
        if self.names and len(self.names) != rows:
            raise ValueError(f"names: expected one for each of {rows} rows, got {self.names}")

    def valid(self) -> Tensor:
        """Frames within the rows' lengths, bool `(B, N)`."""
        return masks.inside(self.lengths, self.x1.shape[1])

    def counted(self, region: str) -> Tensor:
        """Frames that count in the loss, bool `(B, N)`: of the "span" (`loss_mask`), or "all"."""
        if region == "span" and self.loss_mask is not None:
            return self.valid() & self.loss_mask
        return self.valid()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """On another device, with the conditions that are tensors."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """In page-locked memory, from where a copy to a GPU does not hold up the host."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            change(self.x1),
            change(self.lengths),
            {
                name: change(value) if isinstance(value, Tensor) else value
                for name, value in self.conditions.items()
            },
            None if self.loss_mask is None else change(self.loss_mask),
            self.names,
        )
