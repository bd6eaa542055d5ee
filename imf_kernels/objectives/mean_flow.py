"""MeanFlow: the mean velocity's own differential equation as a target (arXiv 2505.13447).

    u(z_t, t, r) = v + (r - t) d/dt u(z_t, t, r)        dz/dt = v, time 1 is data

The baseline that IntMeanFlow is measured against: no teacher's rollout, but a derivative of the
student. The target has no gradient, so neither has the derivative: the one evaluation with gradient
is an ordinary one, through fused ops and the student's wrapper.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imf_kernels import checks
from imf_kernels.objectives import draws, total_derivative
from imf_kernels.objectives.batch import Batch
from imf_kernels.objectives.intervals import Intervals, LogitNormal, at, start_of
from imf_kernels.objectives.state import Stateful
from imf_kernels.objectives.students import Prepared, expect_untold, regress
from imf_kernels.profiling import spanned
from imf_kernels.teacher import Teacher


class MeanFlow(Stateful):
    """`loss, info = objective(student, batch)`, in any training loop; see `IntMeanFlow`.

    Beside the evaluation with gradient a call costs, without gradient: with "jvp" one evaluation of
    the student and its tangents on reference ops, attention scores and all; with "difference" two
    evaluations on fused ops, `one_sided` one. And one of the teacher, if there is one. Rows with
    r = t pay for the derivative too, though their target is v alone: which these are is known on
    the device only.

    Args:
        teacher: v is its guided velocity; None: the data's own, `z_1 - z_0`, from scratch.
        intervals: How `[t, r]` is drawn; a curriculum follows the attribute `progress`, see
            `IntMeanFlow`.
        derivative: "jvp" or "difference" (`total_derivative`). The first call with "jvp" checks it
            against a difference: an op without forward-mode derivative may drop tangents silently.
        step: Of the difference, in t. The default agrees with the derivative. But embeddings of
            1000 t leave ripples in a teacher's velocity, which a derivative magnifies: where it is
            many times the slope beneath them, a difference over .05 to .1 takes that instead.
        one_sided: First order instead of second, from the evaluation with gradient; wants steps of
            1e-5, and no autocast.
        adaptive: c of each row's weight `1 / (e + c)`, e its mean squared error over counted frames
            and channels; None weighs all rows 1.
        region: "span": the loss covers `batch.loss_mask`; "all": all valid frames.
        generator: For all draws; None: torch's default on the batch's device.

    A call raises TypeError for students of half precision or FP8 weights, whose derivative has no
    digits, and RuntimeError where the first call's check fails.
    """

    def __init__(
        self,
        teacher: Teacher | None = None,
        *,
        intervals: LogitNormal | Intervals | None = None,
        derivative: str = "jvp",
        step: float = total_derivative.STEP,
        one_sided: bool = False,
        adaptive: float | None = 0.01,
        region: str = "span",
        generator: torch.Generator | None = None,
    ) -> None:
        checks.choice("derivative", derivative, ("jvp", "difference"))
        checks.choice("region", region, ("span", "all"))
        if not 0 < step < 1:
            raise ValueError(f"step: expected a number in (0, 1), got {step}")
        if adaptive is not None and not adaptive > 0:
            raise ValueError(f"adaptive: expected a number > 0 or None, got {adaptive}")
        if one_sided and derivative == "jvp":
            raise ValueError("one_sided: expected False with derivative 'jvp', got True")
        self.teacher, self.derivative, self.step = teacher, derivative, step
        self.intervals = intervals if intervals is not None else LogitNormal()
        self.one_sided, self.adaptive = one_sided, adaptive
        self.region, self.generator = region, generator
        self.progress = start_of(self.intervals)
        self._verified = False

    @spanned("loss")
    def __call__(self, student: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss, and detached values to log."""
        expect_untold(student, self)
        x1 = batch.x1.detach()
        rows, device = x1.shape[0], x1.device
        drawn = self.intervals.draw(rows, self.generator, device, **at(self.progress))
        t, r = (time.to(x1.dtype) for time in drawn)
        noise = draws.normal_like(x1, self.generator)
        z, v = torch.lerp(noise, x1, t[:, None, None]), x1 - noise
        if self.teacher is not None:
            cond = self.teacher.prepare(lengths=batch.lengths, **batch.conditions)
            v = self.teacher.velocity(z, t, cond)

        if self.derivative == "jvp":
            if not self._verified:
                total_derivative.verify(student, batch, z, v)
                self._verified = True
            slope = total_derivative.jvp(student, batch, z, t, r, v)
            u = Prepared(student, batch)(z, t, r)
        elif self.one_sided:
            if torch.is_autocast_enabled(device.type):
                raise ValueError("one_sided: expected False under autocast, got True")
            u = Prepared(student, batch)(z, t, r)
            slope = total_derivative.difference(student, batch, z, t, r, v, step=self.step, u=u)
        else:
            slope = total_derivative.difference(student, batch, z, t, r, v, step=self.step)
            u = Prepared(student, batch)(z, t, r)

        target, mask = v + (r - t)[:, None, None] * slope, batch.counted(self.region)
        weights = None
        if self.adaptive is not None:
            _, errors = regress(u.detach(), target, mask)
            weights = 1 / (errors + self.adaptive)
        loss, errors = regress(u, target, mask, weights)
        return loss, {"loss": loss.detach(), "row_error": errors, "interval": r - t}
