"""How the intervals `[t, r]` of training are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imf_kernels import checks
from imf_kernels.objectives import draws


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """A length d from Kumaraswamy(a, b), then its start t uniform in `[0, 1 - d]`, r = t + d.

    a = 1, b = 2 is exactly two sorted uniform draws; a < 1 emphasises small intervals, a > 1 large
    ones, b < 2 as well. The paper says only that smaller ones are emphasised.

    Attributes:
        a, b: Shape of the length's distribution, `P(length <= d) = 1 - (1 - d^a)^b`.
        min_length: Lengths are at least this (their targets divide by it).
        full: Share of rows of the largest length, which is 1, `[0, 1]`, but for a curriculum.
        boundary: Share of rows with r = t, t uniform, whose target is the guided velocity itself.
        curriculum: `(first, share)`, for broader intervals to be learned more gradually: the
            largest length grows from `first` to 1 over this share of training, and lengths follow
            the distribution above, given that they are no larger. None: it is 1 from the start.
    """

    a: float = 1.0
    b: float = 2.0
    min_length: float = 1e-3
    full: float = 0.0
    boundary: float = 0.0
    curriculum: tuple[float, float] | None = None

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
        if self.curriculum is not None:
            self._check(self.curriculum)

    def _check(self, curriculum: object) -> None:
        if not isinstance(curriculum, tuple | list) or len(curriculum) != 2:
            raise ValueError(f"curriculum: expected (first, share), got {curriculum!r}")
        first, share = curriculum
        checks.number("curriculum", first, self.min_length, 1)
        checks.number("curriculum", share, 0, 1)
        if not share > 0:
            raise ValueError(f"curriculum: expected a share > 0, got {share}")
        object.__setattr__(self, "curriculum", (first, share))  # YAML has lists

    def largest(self, progress: float) -> float:
        """The largest length at this share of training, in [0, 1]."""
        checks.number("progress", progress, 0, 1)
        first, share = self.curriculum or (1.0, 1.0)
        return 1.0 if progress >= share else min(first + (1 - first) * progress / share, 1.0)

    def draw(
        self,
        rows: int,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
        *,
        progress: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """`t, r`, float32 `(rows,)`, 0 <= t <= r <= 1, on `device` (default: the generator's).

        Args:
            progress: How much of training is done, in [0, 1]: where a curriculum stands.
        """
        largest = self.largest(progress)
        shorter = 1 - (1 - largest**self.a) ** self.b  # P(length <= largest)
        u, start, kind = draws.uniform((3, rows), generator, device)
        length = (1 - (1 - shorter * u) ** (1 / self.b)) ** (1 / self.a)
        length = length.clamp(self.min_length, largest).masked_fill(kind < self.full, largest)
        t = start * (1 - length)
        r = (t + length).clamp(max=1.0)
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


def start_of(intervals: Any) -> float | None:
    """An objective's `progress` before training: 0 with a curriculum, else None."""
    return None if getattr(intervals, "curriculum", None) is None else 0.0


def at(progress: float | None) -> dict[str, float]:
    """What `draw` is told of it: nothing where it has no curriculum."""
    return {} if progress is None else {"progress": progress}
