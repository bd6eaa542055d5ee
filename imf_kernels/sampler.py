"""Fixed-NFE sampling, eager: a student, or a guided teacher, along a time grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from imf_kernels import checks, grids
from imf_kernels.profiling import span
from imf_kernels.solver import (
    Callback,
    VelocityModel,
    euler,
    laid_out,
    model_dtype,
    row_lengths,
)


def sample(
    model: VelocityModel,
    noise: Tensor,
    cond: Any = None,
    grid: str | Tensor | Sequence[float] = "uniform",
    *,
    nfe: int | None = None,
    guidance: Tensor | float | None = None,
    intermediates: bool = False,
    callback: Callback | None = None,
    progress: bool = False,
    grad: bool = False,
) -> Tensor:
    """Carry noise to data: `x += (r - t) u(x, t, r)` over the grid's intervals.

    Args:
        model: A student (no guidance), or a teacher's model with `guidance`.
        noise: State at time 0, float32 `(B, N, C)`.
        cond: From `model.prepare`, prepared with `guided=True` if `guidance` is given.
        grid: Float32 times `(nfe + 1,)` ascending from 0 to 1, or a name with `nfe`.
        nfe: Number of evaluations; may be left out for a custom grid.
        guidance: w (`imf_kernels.guidance`), a number or float32 `(B,)`; None for no guidance. The
            number 1 is guidance too: it asks for both branches.
        intermediates: Return the states at all times, `(nfe + 1, B, N, C)`, noise first.
        callback: Called as `callback(k, x)` after step k.
        progress: Show a progress bar (needs `rich`).
        grad: Let gradients flow through the solve.

    Returns:
        The state at time 1, float32 `(B, N, C)`; frames beyond `cond["lengths"]` stay noise.

    Raises:
        ValueError, TypeError: naming the argument, the expected and the given value; values are
            read on CPU tensors only.
    """
    checks.state("noise", noise)
    times = grids.make(grid, nfe).to(noise.device, non_blocking=noise.is_cuda)
    checks.guidance(guidance, noise)
    steps = times.numel() - 1
    per_row = times[:, None].expand(-1, noise.shape[0]).contiguous()
    with (
        span("solve", steps),
        torch.set_grad_enabled(grad),
        _Progress(steps, callback, progress) as on_step,
    ):
        run = euler(
            _velocity(model, times, per_row, laid_out(model, cond, len(noise)), live=grad),
            noise,
            per_row.diff(dim=0),
            guidance,
            lengths=row_lengths(cond, noise.shape[0]),
            model_dtype=model_dtype(model, noise.dtype),
            accumulate=False,
            keep=intermediates,
            callback=on_step,
        )
    return run.x if run.states is None else run.states


def _velocity(
    model: Any, times: Tensor, per_row: Tensor, cond: Any, *, live: bool
) -> Callable[[int, Tensor], Tensor]:
    """The model at step k: from step tables where it has them, else (and for gradients) live."""
    if live or not hasattr(model, "tables"):
        return lambda k, x: model(x, per_row[k], per_row[k + 1], cond)
    tables = model.tables(times[:-1], times[1:])
    return lambda k, x: model.evaluate(x, tables.at(k), cond)


class _Progress:
    """The callback of a solve, with a progress bar around it when one is asked for."""

    def __init__(self, steps: int, callback: Callback | None, show: bool) -> None:
        self.callback = callback
        self.bar: Any = None
        if show:
            from rich.progress import Progress

            self.bar = Progress()
            self.task = self.bar.add_task("sampling", total=steps)

    def __enter__(self) -> Callback | None:
        if self.bar is None:
            return self.callback
        self.bar.start()
        return self._step

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def _step(self, k: int, x: Tensor) -> None:
        if self.callback is not None:
            self.callback(k, x)
        self.bar.advance(self.task)
