"""IntMeanFlow: a student regressed on the guided teacher's mean velocity (arXiv 2510.07979).

    D = sum_k dt_k v(z_k, t_k)           n guided Euler sub-steps over [t, r], no gradient (Eq. 4-6)
    loss = |u(z_t, t, r) - D / (r - t)|^2                                                  (Eq. 8)

No JVP and no self-bootstrap; the student runs without guidance, for one w or told which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from imf_kernels import checks
from imf_kernels.objectives import draws
from imf_kernels.objectives.batch import Batch
from imf_kernels.objectives.intervals import Intervals, at, start_of
from imf_kernels.objectives.rollouts import (
    RolloutCache,
    Target,
    TeacherRollout,
    draw_pairs,
)
from imf_kernels.objectives.state import Stateful
from imf_kernels.objectives.students import Prepared
from imf_kernels.ops.mean_velocity_loss import mean_velocity_loss
from imf_kernels.profiling import spanned
from imf_kernels.teacher import Teacher

Drawn = Callable[[int, torch.Generator | None, torch.device], Tensor]
"""`(rows, generator, device)` to a value per row, `(rows,)`."""


class IntMeanFlow(Stateful):
    """`loss, info = objective(student, batch)`, in any training loop.

    The student is a `VelocityModel` with `prepare(lengths=..., **batch.conditions)`, as the
    teacher's model is (the teacher's is called with `guided=` besides).

    Args:
        teacher: The guided teacher.
        nfe: Sub-steps n of a rollout (the paper: 16, WER 1.60; 2: 1.83).
        spacing: Sub-step positions: "uniform", "sway", "cosine", or "jitter" (uniform, each
            interior time moved by up to half a sub-step, so that the student sees all times).
        intervals: How `[t, r]` is drawn with source "data".
        source: "data": z_t lies on the line from noise to data, and the rollout covers `[t, r]`.
            "noise": the rollout covers `[0, 1]` from noise, and its pairs of times are the
            intervals: the student sees the states that sampling will visit.
        targets: Targets of each rollout. The first is the rollout itself with source "data"; all
            others are random pairs of its times, a share `intervals.full` of them (0, n). With
            source "noise" a curriculum's largest length bounds the share of sub-steps between both.
        region: "span": the loss covers `batch.loss_mask`; "all": all valid frames. The rollout
            always covers all valid frames, as sampling does.
        guidance: For a student that is told w (`model.student(guidance=True)`): where each row's
            comes from, `(least, greatest)` for a uniform draw, a number, or a callable of `(rows,
            generator, device)` that returns float `(rows,)`. The teacher's own w does not count
            then. None: it does, and the student is not told.
        weighting: Per-row loss weights from `(t, r)`; None weighs all 1.
        cache: Keep rollouts and use them again. The batch of a call is then used only when the
            cache wants a new rollout.
        generator: For all draws; None: torch's default on the batch's device.

    Attributes:
        progress: How much of training is done, in [0, 1], for `intervals.curriculum`; whoever
            trains sets it. None without one.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        nfe: int = 16,
        spacing: str = "uniform",
        intervals: Intervals | None = None,
        source: str = "data",
        targets: int = 1,
        region: str = "span",
        guidance: float | tuple[float, float] | Drawn | None = None,
        weighting: Callable[[Tensor, Tensor], Tensor] | None = None,
        cache: RolloutCache | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        checks.positive_int("nfe", nfe)
        checks.positive_int("targets", targets)
        if targets > nfe * (nfe + 1) // 2:
            raise ValueError(
                f"targets: expected at most n (n + 1) / 2 = {nfe * (nfe + 1) // 2}, got {targets}"
            )
        checks.choice("spacing", spacing, ("uniform", "sway", "cosine", "jitter"))
        checks.choice("source", source, ("data", "noise"))
        checks.choice("region", region, ("span", "all"))
        self.intervals = intervals if intervals is not None else Intervals()
        if not isinstance(self.intervals, Intervals):
            raise TypeError(f"intervals: expected Intervals, got {self.intervals}")
        of_pairs = Intervals(full=self.intervals.full, curriculum=self.intervals.curriculum)
        if source == "noise" and self.intervals != of_pairs:
            raise ValueError(
                "intervals: expected nothing but `full` and `curriculum` with source 'noise', "
                f"whose intervals are the rollout's own, got {self.intervals}"
            )
        self.teacher, self.nfe, self.spacing = teacher, nfe, spacing
        self.source, self.targets, self.region = source, targets, region
        self.weighting, self.cache, self.generator = weighting, cache, generator
        self.guidance = _checked_guidance(guidance)
        self.progress = start_of(self.intervals)

    def __call__(self, student: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss, and detached values to log."""
        return self.loss(student, self._rollout_for(batch))

    def by_target(
        self, student: Any, batch: Batch
    ) -> list[Callable[[], tuple[Tensor, dict[str, Tensor]]]]:
        """The same a target at a time: the mean of what these return is the loss.

        Run each backward before the next is called, and the activations of one target are held
        instead of those of all.
        """
        rollout = self._rollout_for(batch)
        targets = self._targets(rollout)
        return [partial(self._regress, student, rollout, [target]) for target in targets]

    def remembered(self) -> dict[str, Any]:
        cache = {} if self.cache is None else {"cache": self.cache.remembered()}
        return super().remembered() | cache

    def recall(self, held: Mapping[str, Any]) -> None:
        held = dict(held)
        if self.cache is not None:
            self.cache.recall(held.pop("cache", {}))
        super().recall(held)

    @torch.no_grad()
    def rollout(self, batch: Batch) -> TeacherRollout:
        """The teacher's part: n guided evaluations, no gradient."""
        x1 = batch.x1
        rows, device = x1.shape[0], x1.device
        teacher, w = self.teacher, self._draw_guidance(x1)
        if w is not None:
            teacher = teacher.with_guidance(w)
        cond = teacher.prepare(lengths=batch.lengths, **batch.conditions)
        z = draws.normal_like(x1, self.generator)
        if self.source == "data":
            drawn = self.intervals.draw(rows, self.generator, device, **at(self.progress))
            t, r = (time.to(x1.dtype) for time in drawn)
            z = torch.lerp(z, x1, t[:, None, None])
        else:
            t, r = x1.new_zeros(rows), x1.new_ones(rows)
        spacing = self._jittered(rows, device) if self.spacing == "jitter" else self.spacing
        keep = self.source == "noise" or self.targets > 1
        run = teacher.integrate(z, t, r, self.nfe, cond, spacing=spacing, keep=keep)
        velocity = teacher.velocity(z, t, cond) if self.intervals.boundary > 0 else None
        # for one target the ends of the rollout are all that is needed, and held
        states = z[None] if run.states is None else run.states
        displacements = run.displacement[None] if run.displacements is None else run.displacements
        return TeacherRollout(batch, run.times, run.elapsed, states, displacements, velocity, w)

    def loss(self, student: Any, rollout: TeacherRollout) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's part: one evaluation with gradient per target."""
        return self._regress(student, rollout, self._targets(rollout))

    def _rollout_for(self, batch: Batch) -> TeacherRollout:
        """A new one of this batch, or what the cache deals."""
        if self.cache is None:
            return self.rollout(batch)
        if self.cache.wants_new():
            self.cache.add(self.rollout(batch))
        return self.cache.deal(batch.x1.device)

    @spanned("loss")
    def _regress(
        self, student: Any, rollout: TeacherRollout, targets: Sequence[Target]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        told = {} if rollout.guidance is None else {"guidance": rollout.guidance}
        student = Prepared(student, rollout.batch, **told)
        mask = rollout.batch.counted(self.region)
        losses, row_errors, lengths = [], [], []
        for target in targets:
            loss, rows = mean_velocity_loss(
                student(target.z, target.t, target.r),
                target.displacement,
                target.t,
                target.r,
                interval=target.interval,
                velocity=target.velocity,
                mask=mask,
                weights=None if self.weighting is None else self.weighting(target.t, target.r),
            )
            losses.append(loss)
            row_errors.append(rows)
            lengths.append(target.interval)
        loss = torch.stack(losses).mean()
        info = {
            "loss": loss.detach(),
            "row_error": torch.cat(row_errors),
            "interval": torch.cat(lengths),
        }
        return loss, info

    def _targets(self, rollout: TeacherRollout) -> list[Target]:
        whole, span = [rollout.whole()], self.nfe
        if self.source == "noise":
            largest = self.intervals.largest(self.progress or 0.0)
            whole, span = [], max(int(largest * self.nfe + 1e-6), 1)
        drawn = self.nfe, rollout.times.shape[1], self.intervals.full, self.generator
        return whole + [
            rollout.pair(*draw_pairs(*drawn, rollout.times.device, span))
            for _ in range(self.targets - len(whole))
        ]

    def _draw_guidance(self, x1: Tensor) -> Tensor | None:
        """w of each row, `(B,)` in the state's dtype."""
        rows, device = len(x1), x1.device
        if self.guidance is None:
            return None
        if callable(self.guidance):
            w = self.guidance(rows, self.generator, device)
            checks.shape("guidance", w, rows)
            return w.to(x1)
        least, greatest = self.guidance
        return torch.lerp(
            x1.new_full((rows,), least),
            x1.new_full((rows,), greatest),
            draws.uniform((rows,), self.generator, device).to(x1.dtype),
        )

    def _jittered(self, rows: int, device: torch.device) -> Tensor:
        """Fractions `(n + 1, rows)`: interior times anywhere in their half sub-steps."""
        shift = draws.uniform((self.nfe + 1, rows), self.generator, device) - 0.5
        shift[0] = shift[-1] = 0.0
        steps = torch.arange(self.nfe + 1, device=device)[:, None]
        return (steps + 0.98 * shift) / self.nfe


def _checked_guidance(guidance: Any) -> tuple[float, float] | Drawn | None:
    """A number as a range of one."""
    if guidance is None or callable(guidance):
        return guidance
    ends = guidance if isinstance(guidance, tuple | list) else (guidance, guidance)
    if len(ends) != 2:
        raise ValueError(f"guidance: expected (least, greatest), got {guidance!r}")
    for end in ends:
        checks.number("guidance", end)
    if ends[0] > ends[1]:
        raise ValueError(f"guidance: expected least <= greatest, got {guidance!r}")
    return ends[0], ends[1]
