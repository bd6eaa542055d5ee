"""The student's side of every objective: evaluated within or through its wrapper, regressed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from imf_kernels.objectives.batch import Batch
from imf_kernels.ops.mean_velocity_loss import mean_velocity_loss
from imf_kernels.profiling import span
from imf_kernels.solver import model_dtype


class Prepared:
    """A student with a batch's conditioning: `prepared(z, t, r)` is its mean velocity.

    Evaluations go through the wrapper (DistributedDataParallel), if there is one: it synchronises
    gradients in its own forward. `inner` is the student itself, `cond` what it prepared. Under
    `fully_shard`, register `prepare` as a forward method as well.

    Raises:
        TypeError: a wrapper outside of whose forward the student has no weights.
    """

    def __init__(self, student: Any, batch: Batch, **conditions: Any) -> None:
        if any(base.__name__ == "FullyShardedDataParallel" for base in type(student).__mro__):
            raise TypeError(
                "student: expected one under DistributedDataParallel or fully_shard, "
                f"got {type(student).__name__}, outside of whose forward it has no weights"
            )
        self.outer = student
        self.inner = _inner(student)
        if hasattr(self.inner, "keep_weights_apart") and _sharded(self.inner):
            self.inner.keep_weights_apart()
        self.cond = self.inner.prepare(lengths=batch.lengths, **batch.conditions, **conditions)

    def __call__(self, z: Tensor, t: Tensor, r: Tensor, *, inner: bool = False) -> Tensor:
        with span("evaluation"):
            return self.evaluate(z, t, r, inner=inner)

    def evaluate(self, z: Tensor, t: Tensor, r: Tensor, *, inner: bool = False) -> Tensor:
        """The same for `solver.euler`, which has a range of its own around it."""
        model: Any = self.inner if inner else self.outer
        return model(z.to(model_dtype(self.inner, z.dtype)), t, r, self.cond)


def expect_untold(student: Any, objective: object) -> None:
    """For objectives of one guidance.

    Raises:
        ValueError: a student that is told its guidance.
    """
    if getattr(getattr(_inner(student), "config", None), "guidance", False):
        raise ValueError(
            "student: expected one that is not told its guidance, which IntMeanFlow draws and "
            f"{type(objective).__name__} does not, got one of `model.student(guidance=True)`"
        )


def _inner(student: Any) -> Any:
    return student if hasattr(student, "prepare") else student.module


def _sharded(model: nn.Module) -> bool:
    """Whether weights are DTensors, as under `fully_shard`."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def regress(
    u: Tensor, target: Tensor, mask: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`ops.mean_velocity_loss` of `u` against a velocity, not a displacement: over [0, 1] the two
    are one."""
    start = target.new_zeros(len(target))
    return mean_velocity_loss(u, target, start, start + 1, mask=mask, weights=weights)


def scale(u: Tensor, velocity: Tensor, mask: Tensor) -> Tensor:
    """The rms of `u` over that of `velocity`, where `mask` `(B, N)`; NaN where that is nowhere."""

    def energy(x: Tensor) -> Tensor:
        return x.detach().to(velocity.dtype).square().sum(-1).masked_fill(~mask, 0.0).sum()

    return torch.sqrt(energy(u) / energy(velocity))
