"""The guided teacher: displacement and mean velocity over `[t, r]` (arXiv 2510.07979, Eq. 3-6)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from imf_kernels import checks, grids, guidance
from imf_kernels.profiling import span
from imf_kernels.solver import VelocityModel, model_dtype, solve


class Rollout(NamedTuple):
    """n Euler sub-steps of the teacher from `z` at `t` to `r`; states and sums at every time.

    `displacement` is `sum dt v`, `(B, N, C)`, and `z` its state at `r`. `times` and `elapsed` (the
    time since `t`, with the digits that differences of `times` have lost) are `(n + 1, B)`;
    `states` and `displacements` (accumulated from 0) are `(n + 1, B, N, C)` if they were kept.
    """

    displacement: Tensor
    z: Tensor
    times: Tensor
    elapsed: Tensor
    states: Tensor | None
    displacements: Tensor | None


class Steps(NamedTuple):
    """Sub-steps of each row: times and elapsed time `(n + 1, B)`, lengths `dt` `(n, B)`."""

    times: Tensor
    elapsed: Tensor
    dt: Tensor


class Teacher:
    """A frozen velocity model with its guidance, evaluated in its own dtype, also under autocast.

    Deliberately no `nn.Module`: held by an objective or a student it stays out of the module tree,
    so that no optimizer, EMA, checkpoint or `.train()` reaches it.

    Args:
        model: `VelocityModel`; an `nn.Module` is put in `eval()`.
        guidance: w (`imf_kernels.guidance`), a number or float32 `(B,)`; None or 1 means none, and
            the unconditional branch is then not evaluated.
    """

    def __init__(self, model: VelocityModel, guidance: Tensor | float | None = None) -> None:
        self.model: Any = model.eval() if isinstance(model, nn.Module) else model
        self.guidance = _effective(guidance)

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        """Copies of what holds a teacher (EMA) share it."""
        return self

    def with_guidance(self, guidance: Tensor | float | None) -> Self:
        """The same teacher with another w."""
        other = copy.copy(self)
        other.guidance = _effective(guidance)
        return other

    @torch.no_grad()
    def prepare(self, **conditions: Any) -> Any:
        """The model's `prepare`, for both branches when guided."""
        with _without_autocast(*conditions.values()):
            return self.model.prepare(**conditions, guided=self.guidance is not None)

    @torch.no_grad()
    def velocity(self, z: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """The guided velocity at `(z, t)`: `(B, N, C)` in `z`'s dtype."""
        checks.state("z", z)
        rows, frames, channels = z.shape
        checks.interval(t, t, rows)
        checks.guidance(self.guidance, z)
        with span("evaluation"), _without_autocast(z):
            v = self.model(z.to(model_dtype(self.model, z.dtype)), t, t, cond)
        doubled = 1 if self.guidance is None else 2
        checks.shape("model's velocity", v, doubled * rows, frames, channels)
        if self.guidance is not None:
            v = guidance.combine(v, self.guidance)
        return v.to(z.dtype)

    def integrate(
        self,
        z: Tensor,
        t: Tensor,
        r: Tensor,
        nfe: int,
        cond: Any = None,
        *,
        spacing: str | Tensor | Sequence[float] = "uniform",
        keep: bool = False,
    ) -> Rollout:
        """Run `nfe` Euler sub-steps from `z` at `t` to `r`, each row over its own interval.

        Args:
            z: State at `t`, float32 `(B, N, C)`.
            t, r: Float32 `(B,)`, 0 <= t <= r <= 1.
            nfe: Sub-steps n.
            cond: From `prepare`.
            spacing: Where the sub-steps stand within `[t, r]`: a named grid ("uniform", "sway",
                "cosine", "epss"), or fractions ascending from 0 to 1, `(n + 1,)` or `(n + 1, B)`.
            keep: Keep the states and displacements of all n + 1 times.

        Raises:
            ValueError, TypeError: naming the argument, the expected and the given value; values are
                read on CPU tensors only.
        """
        with torch.no_grad():
            steps = self._steps(z, t, r, nfe, spacing)
            with span("rollout", nfe), _without_autocast(z):
                return self._rollout(z, steps, cond, keep)

    def _rollout(self, z: Tensor, steps: Steps, cond: Any, keep: bool) -> Rollout:
        run = solve(self.model, z, steps.times, steps.dt, cond, self.guidance, keep=keep)
        assert run.displacement is not None
        return Rollout(
            run.displacement, run.x, steps.times, steps.elapsed, run.states, run.displacements
        )

    def _steps(
        self,
        z: Tensor,
        t: Tensor,
        r: Tensor,
        nfe: int,
        spacing: str | Tensor | Sequence[float],
    ) -> Steps:
        """Check `integrate`'s arguments and lay out its sub-steps."""
        checks.state("z", z)
        rows = z.shape[0]
        checks.interval(t, r, rows)
        checks.positive_int("nfe", nfe)
        checks.same_device("t", t, z.device)
        checks.same_device("r", r, z.device)
        checks.guidance(self.guidance, z)
        fractions = _fractions(spacing, nfe, rows).to(z.device, t.dtype, non_blocking=z.is_cuda)
        elapsed = (r - t) * fractions
        return Steps(torch.minimum(t + elapsed, r), elapsed, (r - t) * fractions.diff(dim=0))


def _without_autocast(*given: Any) -> torch.autocast:
    """No autocast on the device of the first tensor given, as it is or as a row."""
    rows = (row for one in given for row in (one if isinstance(one, list | tuple) else [one]))
    device = next((row.device.type for row in rows if isinstance(row, Tensor)), "cpu")
    return torch.autocast(device, enabled=False)


def _effective(guidance: Tensor | float | None) -> Tensor | float | None:
    """None where the unconditional branch does not count."""
    plain = not isinstance(guidance, Tensor) and guidance in (None, 1)
    return None if plain else guidance


def _fractions(spacing: str | Tensor | Sequence[float], nfe: int, rows: int) -> Tensor:
    """Sub-step positions `(n + 1, 1)` or `(n + 1, B)` within the unit interval."""
    if not isinstance(spacing, Tensor) or spacing.ndim == 1:
        return grids.make(spacing, nfe, name="spacing")[:, None]
    checks.shape("spacing", spacing, nfe + 1, rows)
    if checks.readable(spacing):
        ends = bool((spacing[0] == 0).all()) and bool((spacing[-1] == 1).all())
        if not ends or not bool((spacing.diff(dim=0) > 0).all()):
            raise ValueError(f"spacing: expected fractions ascending from 0 to 1, got {spacing}")
    return spacing
