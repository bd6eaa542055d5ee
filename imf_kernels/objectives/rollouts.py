"""A teacher's rollout as training material: each pair of its times is a target already paid."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from imf_kernels import checks
from imf_kernels.objectives.batch import Batch


class Target(NamedTuple):
    """A student's input and what it is to be: `z` at `t`, displacement over `[t, r]`.

    `velocity` is the target of rows with r = t, if there are any.
    """

    z: Tensor
    t: Tensor
    r: Tensor
    displacement: Tensor
    velocity: Tensor | None = None


class TeacherRollout(NamedTuple):
    """A batch with the teacher's states along it.

    `times` `(n + 1, B)`; `states`, `displacements` `(n + 1, B, N, C)`, displacements accumulated
    from the first time; `velocity` the guided velocity at the first time, or None.
    """

    batch: Batch
    times: Tensor
    states: Tensor
    displacements: Tensor
    velocity: Tensor | None

    def whole(self) -> Target:
        """The target over the whole rollout."""
        return Target(
            self.states[0], self.times[0], self.times[-1], self.displacements[-1], self.velocity
        )

    def pair(self, i: Tensor, j: Tensor) -> Target:
        """The target from time i to time j, indices `(B,)` per row, i < j.

        A row with r = t has not moved: its velocity is the target here too.
        """
        rows = torch.arange(self.times.shape[1], device=self.times.device)
        displacement = self.displacements[j, rows] - self.displacements[i, rows]
        return Target(
            self.states[i, rows],
            self.times[i, rows],
            self.times[j, rows],
            displacement,
            self.velocity,
        )


def draw_pairs(
    nfe: int, rows: int, full: float, generator: torch.Generator | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Uniform pairs i < j of n + 1 times, `(rows,)` each; a share `full` takes (0, n)."""
    source = generator.device if generator is not None else device
    pairs = torch.triu_indices(nfe + 1, nfe + 1, offset=1, device=source)
    pick = torch.randint(pairs.shape[1], (rows,), generator=generator, device=source)
    whole = torch.rand(rows, generator=generator, device=source) < full
    i = pairs[0, pick].masked_fill(whole, 0)
    j = pairs[1, pick].masked_fill(whole, nfe)
    return i.to(device), j.to(device)


class RolloutCache:
    """Keeps up to `capacity` rollouts and deals them again: the teacher is paid once for many uses.

    Once full, a share `refresh` of the calls replaces the oldest rollout by a new one. States are
    held where the teacher left them: `capacity * 2 (n + 1) B N C` float32.
    """

    def __init__(
        self, capacity: int, *, refresh: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        checks.positive_int("capacity", capacity)
        if not 0 <= refresh <= 1:
            raise ValueError(f"refresh: expected a share in [0, 1], got {refresh}")
        self.capacity, self.refresh, self.generator = capacity, refresh, generator
        self._rollouts: list[TeacherRollout] = []
        self._oldest = 0

    def __len__(self) -> int:
        return len(self._rollouts)

    def wants_new(self) -> bool:
        """Whether this call should add a rollout."""
        if len(self) < self.capacity:
            return True
        return self.refresh > 0 and float(torch.rand((), generator=self.generator)) < self.refresh

    def add(self, rollout: TeacherRollout) -> None:
        if len(self) < self.capacity:
            self._rollouts.append(rollout)
        else:
            self._rollouts[self._oldest] = rollout
            self._oldest = (self._oldest + 1) % self.capacity

    def deal(self) -> TeacherRollout:
        """One of the rollouts, uniformly."""
        return self._rollouts[int(torch.randint(len(self), (), generator=self.generator))]
