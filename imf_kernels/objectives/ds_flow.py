"""DSFlow: a student for a few fixed step counts, supervised twice (arXiv 2602.09041).

    endpoint:  |x_K - x_T(1)|^2                  x_K the student's own solve in K steps
    velocity:  |u(m, t_m, t_m) - D / dt|^2       D = x_T(t + dt) - x_T(t), m = x_T(t) + D / 2

x_T is the guided teacher's fine solve from the same noise. The second target is the midpoint rule's
velocity: exact where paths are straight, elsewhere to second order in dt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from imf_kernels import checks
from imf_kernels.objectives import draws
from imf_kernels.objectives.batch import Batch
from imf_kernels.objectives.rollouts import TeacherRollout
from imf_kernels.objectives.state import Stateful
from imf_kernels.objectives.students import Prepared, expect_untold, regress
from imf_kernels.profiling import spanned
from imf_kernels.solver import euler, row_lengths
from imf_kernels.teacher import Teacher


class DSFlow(Stateful):
    """`loss, info = objective(student, batch)`, in any training loop; see `IntMeanFlow`.

    Calls take the step counts in turn, so that all ranks of a run evaluate equally often; `calls`
    counts them, and is part of the state. A call costs `nfe` guided evaluations of the teacher
    and K + 1 of the student with gradient, K of them a chain.

    Args:
        teacher: The guided teacher.
        counts: Step counts K that the student is made for, each on the K-th part of the teacher's
            times.
        nfe: Sub-steps of the teacher's solve over [0, 1], a multiple of every count.
        spacing: Their positions: "uniform", "sway" or "cosine".
        endpoint: Weight of the endpoint; the velocity's is the rest.
        p_uncond: Share of calls that also regress the student's unconditional branch on that of a
            guided teacher, at the midpoints, so that the student can still be guided, weakly. It is
            then prepared with `guided=True`.
        uncond: Weight of that regression.
        steps: The name under which the student's `prepare` is told K: for a student that knows its
            step count in place of times, "steps" for `models.StepTokenDiT`. None: it is not told.
        region: "span": the loss covers `batch.loss_mask`; "all": all valid frames.
        generator: For all draws; None: torch's default on the batch's device.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        counts: Sequence[int] = (1, 2, 4),
        nfe: int = 16,
        spacing: str = "uniform",
        endpoint: float = 0.7,
        p_uncond: float = 0.02,
        uncond: float = 0.01,
        steps: str | None = None,
        region: str = "span",
        generator: torch.Generator | None = None,
    ) -> None:
        checks.positive_int("nfe", nfe)
        if not counts:
            raise ValueError(f"counts: expected one step count or more, got {counts!r}")
        for count in counts:
            checks.positive_int("counts", count)
        self.parts = math.lcm(*counts)
        if nfe % self.parts:
            raise ValueError(f"nfe: expected a multiple of {self.parts}, got {nfe}")
        for name, share in (("endpoint", endpoint), ("p_uncond", p_uncond)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}: expected a share in [0, 1], got {share}")
        if not uncond >= 0:
            raise ValueError(f"uncond: expected a number >= 0, got {uncond}")
        checks.choice("spacing", spacing, ("uniform", "sway", "cosine"))
        checks.choice("region", region, ("span", "all"))
        self.teacher, self.counts, self.nfe, self.spacing = teacher, tuple(counts), nfe, spacing
        self.endpoint, self.p_uncond, self.uncond = endpoint, p_uncond, uncond
        self.steps, self.region, self.generator, self.calls = steps, region, generator, 0

    def __call__(self, student: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss, and detached values to log."""
        expect_untold(student, self)
        count = self.counts[self.calls % len(self.counts)]
        self.calls += 1
        # evenly spread: every 50th call for a share of .02
        due = int(self.calls * self.p_uncond) > int((self.calls - 1) * self.p_uncond)
        uncond = due and self.teacher.guidance is not None
        return self.loss(student, self.rollout(batch), count, uncond=uncond)

    def remembered(self) -> dict[str, Any]:
        return super().remembered() | {"calls": self.calls}

    def recall(self, held: Mapping[str, Any]) -> None:
        held = dict(held)
        calls = held.pop("calls", None)
        if not isinstance(calls, int):
            raise ValueError(f"state: expected the number of calls, got {calls!r}")
        super().recall(held)
        self.calls = calls

    @torch.no_grad()
    def rollout(self, batch: Batch) -> TeacherRollout:
        """The teacher's part: its solve from noise, of which the states between parts are kept."""
        x1 = batch.x1
        cond = self.teacher.prepare(lengths=batch.lengths, **batch.conditions)
        z = draws.normal_like(x1, self.generator)
        t, r = x1.new_zeros(len(x1)), x1.new_ones(len(x1))
        run = self.teacher.integrate(z, t, r, self.nfe, cond, spacing=self.spacing, keep=True)
        assert run.states is not None
        assert run.displacements is not None
        every = slice(None, None, self.nfe // self.parts)
        states, displacements = run.states[every].clone(), run.displacements[every].clone()
        return TeacherRollout(
            batch, run.times[every], run.elapsed[every], states, displacements, None
        )

    @spanned("loss")
    def loss(
        self, student: Any, rollout: TeacherRollout, count: int, *, uncond: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's part, for `count` steps, with its unconditional branch if asked."""
        batch, stride = rollout.batch, self.parts // count
        told = {} if self.steps is None else {self.steps: count}
        student, mask = Prepared(student, batch, **told), batch.counted(self.region)
        rows = len(batch.x1)

        times, elapsed = rollout.times[::stride], rollout.elapsed[::stride]
        end = euler(
            lambda k, x: student.evaluate(x, times[k], times[k + 1]),
            rollout.states[0],
            elapsed.diff(dim=0),
            lengths=row_lengths(student.cond, rows),
            accumulate=False,
        ).x
        endpoint, errors = regress(end, rollout.states[-1], mask)

        step = (count * draws.uniform((rows,), self.generator, batch.x1.device)).long() * stride
        part = rollout.pair(step, step + stride)
        middle, time = part.z + part.displacement / 2, (part.t + part.r) / 2
        if uncond:
            student = Prepared(student.outer, batch, **told, guided=True)
        u, *other = student(middle, time, time).split(rows)
        velocity, _ = regress(u, part.displacement / part.interval[:, None, None], mask)

        loss = self.endpoint * endpoint + (1 - self.endpoint) * velocity
        info = {"row_error": errors, "endpoint": endpoint.detach(), "velocity": velocity.detach()}
        if uncond:
            teacher = Teacher(self.teacher.model, guidance=0.0)  # w = 0: the unconditional branch
            cond = teacher.prepare(lengths=batch.lengths, **batch.conditions)
            branch, _ = regress(other[0], teacher.velocity(middle, time, cond), mask)
            loss = loss + self.uncond * branch
            info["uncond"] = branch.detach()
        return loss, {"loss": loss.detach(), **info}
