"""SplitMeanFlow: an interval's displacement is the sum of its parts' (arXiv 2507.16884).

    (r - t) u(z_t, t, r) = (s - t) u(z_t, t, s) + (r - s) u(z_s, s, r)        t <= s <= r

The student is its own target, but for rows with r = t, whose target is the guided teacher's
velocity: without them u = 0 solves everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imf_kernels import checks
from imf_kernels.objectives import draws
from imf_kernels.objectives.batch import Batch
from imf_kernels.objectives.intervals import Intervals, at, start_of
from imf_kernels.objectives.state import Stateful
from imf_kernels.objectives.students import Prepared, expect_untold, regress, scale
from imf_kernels.profiling import spanned
from imf_kernels.teacher import Teacher


class SplitMeanFlow(Stateful):
    """`loss, info = objective(student, batch)`, in any training loop; see `IntMeanFlow`.

    A call costs three evaluations of the student, one of them with gradient, and one of the guided
    teacher, all of every row: which rows have r = t is known on the device only, and asking would
    cost a wait, and shapes that change from call to call. `info["scale"]` is the rms of u over
    intervals over that of the teacher's velocity there: healthy near 1 (means are somewhat
    smaller), collapsing towards 0, and NaN for a batch without intervals.

    Args:
        teacher: The guided teacher.
        intervals: How `[t, r]` is drawn; its `boundary` is the share of rows with r = t, half or
            more in the paper. A curriculum follows the attribute `progress`, see `IntMeanFlow`.
        region: "span": the loss covers `batch.loss_mask`; "all": all valid frames.
        generator: For all draws; None: torch's default on the batch's device.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        intervals: Intervals | None = None,
        region: str = "span",
        generator: torch.Generator | None = None,
    ) -> None:
        checks.choice("region", region, ("span", "all"))
        self.intervals = intervals if intervals is not None else Intervals(boundary=0.5)
        if not self.intervals.boundary > 0:
            raise ValueError(
                "intervals: expected a share `boundary` > 0, without which the student collapses "
                f"to 0, got {self.intervals}"
            )
        self.teacher, self.region, self.generator = teacher, region, generator
        self.progress = start_of(self.intervals)

    @spanned("loss")
    def __call__(self, student: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss, and detached values to log."""
        expect_untold(student, self)
        x1 = batch.x1.detach()
        rows, device = x1.shape[0], x1.device
        drawn = self.intervals.draw(rows, self.generator, device, **at(self.progress))
        t, r = (time.to(x1.dtype) for time in drawn)
        share = draws.uniform((rows,), self.generator, device).to(x1.dtype)
        z = torch.lerp(draws.normal_like(x1, self.generator), x1, t[:, None, None])
        cond = self.teacher.prepare(lengths=batch.lengths, **batch.conditions)
        velocity = self.teacher.velocity(z, t, cond)

        student, mask, instant = Prepared(student, batch), batch.counted(self.region), r == t
        target = split_target(student, z, t, r, share)
        u = student(z, t, r)
        loss, errors = regress(u, torch.where(instant[:, None, None], velocity, target), mask)
        info = {
            "loss": loss.detach(),
            "row_error": errors,
            "interval": r - t,
            "scale": scale(u, velocity, mask & ~instant[:, None]),
        }
        return loss, info


@torch.no_grad()
def split_target(
    student: Callable[[Tensor, Tensor, Tensor], Tensor],
    z: Tensor,
    t: Tensor,
    r: Tensor,
    share: Tensor,
) -> Tensor:
    """What `u(z, t, r)` is to be for `student(z, t, r)`, given a split `s = t + share (r - t)`."""
    length = share * (r - t)
    s = torch.minimum(t + length, r)
    first = student(z, t, s).to(z.dtype)
    second = student(z + length[:, None, None] * first, s, r).to(z.dtype)
    return torch.lerp(second, first, share[:, None, None])
