"""How the intervals `[t, r]` of training are drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imf_kernels.objectives import draws


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """A length d from Kumaraswamy(a, b), then its start t uniform in `[0, 1 - d]`, r = t + d.

    a = 1, b = 2 is exactly two sorted uniform draws; a < 1 emphasises small intervals, a > 1 large
    ones, b < 2 as well. The paper says only that smaller ones are emphasised.

    Attributes:
        a, b: Shape of the length's distribution, `P(length <= d) = 1 - (1 - d^a)^b`.
        min_length: Lengths are at least this (their targets divide by it).
        full: Share of rows that take `[0, 1]`.
        boundary: Share of rows with r = t, t uniform, whose target is the guided velocity itself.
    """

    a: float = 1.0
    b: float = 2.0
    min_length: float = 1e-3
    full: float = 0.0
    boundary: float = 0.0

    def __post_init__(self) -> None:
        for name in ("a", "b"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        if not 0 < self.min_length <= 1:
            raise ValueError(f"min_length: expected a number in (0, 1], got {self.min_length}")
        for name in ("full", "boundary"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share in [0, 1], got {getattr(self, name)}")
        if self.full + self.boundary > 1:
            raise ValueError(
                f"full: expected full + boundary <= 1, got {self.full} + {self.boundary}"
            )

    def draw(
        self,
        rows: int,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`t, r`, float32 `(rows,)`, 0 <= t <= r <= 1, on `device` (default: the generator's)."""
        u, start, kind = draws.uniform((3, rows), generator, device)
        length = (1 - (1 - u) ** (1 / self.b)) ** (1 / self.a)
        length = length.clamp(self.min_length, 1.0)
        t = start * (1 - length)
        r = (t + length).clamp(max=1.0)
        full = kind < self.full
        t, r = t.masked_fill(full, 0.0), r.masked_fill(full, 1.0)
        boundary = kind >= 1 - self.boundary
        t, r = torch.where(boundary, start, t), torch.where(boundary, start, r)
        return t, r


@dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """Both times are `sigmoid(N(mean, std))`, sorted (MeanFlow's own, in our direction of time).

    Attributes:
        mean, std: Of the normal distribution; a mean above 0 prefers times near the data.
        boundary: Share of rows with r = t.
    """

    mean: float = 0.4
    std: float = 1.0
    boundary: float = 0.75

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"std: expected a number > 0, got {self.std}")
        if not 0 <= self.boundary <= 1:
            raise ValueError(f"boundary: expected a share in [0, 1], got {self.boundary}")

    def draw(
        self,
        rows: int,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `Intervals.draw`."""
        kind = draws.uniform((rows,), generator, device)
        times = self.mean + self.std * draws.normal_like(kind.new_empty(2, rows), generator)
        t, r = times.sigmoid().sort(dim=0).values
        return t, torch.where(kind < self.boundary, t, r)
