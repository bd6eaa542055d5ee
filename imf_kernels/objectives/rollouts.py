"""A teacher's rollout as training material: each pair of its times is a target already paid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imf_kernels import checks
from imf_kernels.objectives import draws
from imf_kernels.objectives.batch import Batch
from imf_kernels.objectives.state import Stateful, flat, nested


class Target(NamedTuple):
    """A student's input and what it is to be: `z` at `t`, displacement over `[t, r]`.

    `interval` is r - t with all its digits; `velocity` the target of rows with r = t, if any.
    """

    z: Tensor
    t: Tensor
    r: Tensor
    interval: Tensor
    displacement: Tensor
    velocity: Tensor | None = None


class TeacherRollout(NamedTuple):
    """A batch with the teacher's states along it.

    `times` and `elapsed` (the time since the first) `(n + 1, B)`; `states`, `displacements`
    `(n + 1, B, N, C)`, displacements accumulated from the first time, or, where only the whole is
    a target, just the first state and the last displacement; `velocity` the guided velocity at the
    first time, or None; `guidance` the w `(B,)` that the student is to be told, or None.
    """

    batch: Batch
    times: Tensor
    elapsed: Tensor
    states: Tensor
    displacements: Tensor
    velocity: Tensor | None
    guidance: Tensor | None = None

    def to(self, device: torch.device) -> TeacherRollout:
        if self.states.device == device:
            return self
        held = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in flat(self).items()}
        return TeacherRollout.restored(nested(held))

    @staticmethod
    def restored(held: Mapping[str, Any]) -> TeacherRollout:
        """Of what `state.nested` makes of a flat one; all but its sequences is as it was."""
        batch: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in held["batch"].items()
        }
        return TeacherRollout(**{"velocity": None, **held, "batch": Batch(**batch)})

    def whole(self) -> Target:
        """The target over the whole rollout."""
        return Target(
            self.states[0],
            self.times[0],
            self.times[-1],
            self.elapsed[-1],
            self.displacements[-1],
            self.velocity,
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
            self.elapsed[j, rows] - self.elapsed[i, rows],
            displacement,
            self.velocity,
        )


def draw_pairs(
    nfe: int,
    rows: int,
    full: float,
    generator: torch.Generator | None,
    device: torch.device,
    span: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Uniform pairs i < j of n + 1 times, `(rows,)` each, no more than `span` apart (None: n), and
    a share `full` of them just as many."""
    span = nfe if span is None else span
    i, j = torch.triu_indices(nfe + 1, nfe + 1, offset=1, device="cpu")
    pairs = torch.stack([i, j])[:, j - i <= span].to(device, non_blocking=True)
    pick, kind = draws.uniform((2, rows), generator, device)
    first, last = pairs[:, (pick * pairs.shape[1]).long()]
    widest, start = kind < full, (pick * (nfe + 1 - span)).long()
    return torch.where(widest, start, first), torch.where(widest, start + span, last)


class RolloutCache(Stateful):
    """Keeps up to `capacity` rollouts and deals them again: the teacher is paid once for many uses.

    Once full, a share `refresh` of the calls replaces the oldest rollout by a new one. Rollouts are
    held where the teacher left them, `2 (n + 1) B N C` float32 each beside their batch. All of them
    are part of its state.
    """

    def __init__(
        self, capacity: int, *, refresh: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        checks.positive_int("capacity", capacity)
        if not 0 <= refresh <= 1:
            raise ValueError(f"refresh: expected a share in [0, 1], got {refresh}")
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(f"generator: expected one on the CPU, got one on {generator.device}")
        self.capacity, self.refresh, self.generator = capacity, refresh, generator
        self._rollouts: list[TeacherRollout] = []
        self._oldest = 0

    def __len__(self) -> int:
        return len(self._rollouts)

    @property
    def nbytes(self) -> int:
        """Bytes of the states and displacements that it holds."""
        return sum(held.states.nbytes + held.displacements.nbytes for held in self._rollouts)

    def wants_new(self) -> bool:
        """Whether this call should add a rollout."""
        if len(self) < self.capacity:
            return True
        return (
            self.refresh > 0
            and float(torch.rand((), generator=self.generator, device="cpu")) < self.refresh
        )

    def add(self, rollout: TeacherRollout) -> None:
        if len(self) < self.capacity:
            self._rollouts.append(rollout)
        else:
            self._rollouts[self._oldest] = rollout
            self._oldest = (self._oldest + 1) % self.capacity

    def deal(self, device: torch.device | None = None) -> TeacherRollout:
        """One of the rollouts, uniformly; on a device, where those of a loaded state move to."""
        index = int(torch.randint(len(self), (), generator=self.generator, device="cpu"))
        if device is not None:
            self._rollouts[index] = self._rollouts[index].to(device)
        return self._rollouts[index]

    def remembered(self) -> dict[str, Any]:
        rollouts = {"rollouts": self._rollouts} if self._rollouts else {}
        return super().remembered() | {"oldest": self._oldest} | rollouts

    def recall(self, held: Mapping[str, Any]) -> None:
        held = dict(held)
        rollouts = [TeacherRollout.restored(rollout) for rollout in held.pop("rollouts", ())]
        oldest = held.pop("oldest", None)
        if len(rollouts) > self.capacity or oldest is None:
            raise ValueError(
                f"state: expected one of a cache of at most {self.capacity} rollouts, "
                f"got {len(rollouts)} and the oldest {oldest}"
            )
        super().recall(held)
        self._rollouts, self._oldest = rollouts, oldest
