"""The one Euler loop: teacher rollouts and student sampling differ in their times only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from imf_kernels.ops.guided_euler_step import guided_euler_step
from imf_kernels.profiling import span

Callback = Callable[[int, Tensor], None]


class VelocityModel(Protocol):
    """What a solve asks of a model: a teacher's velocity, or a student's mean velocity.

    `x` is `(B, N, C)` in the model's `dtype` attribute (without one: the state's float32); `t, r`
    are float32 `(B,)`; `cond` is what the model's own `prepare` returned. Prepared for guidance, it
    holds both branches, and the result has 2B rows: `[0:B]` conditional, `[B:2B]` unconditional.
    If `cond["lengths"]` exists (valid frames per row), frames beyond do not move. If the model has
    `lay_out(cond, rows)`, a solve of so many rows begins with it and evaluates with its result.
    """

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, cond: Any, /) -> Tensor: ...


class Trajectory(NamedTuple):
    """A solve: its end, and what was asked for of its way."""

    x: Tensor
    displacement: Tensor | None
    states: Tensor | None
    displacements: Tensor | None


def euler(
    velocity: Callable[[int, Tensor], Tensor],
    x: Tensor,
    dt: Tensor,
    guidance: Tensor | float | None = None,
    *,
    lengths: Tensor | None = None,
    model_dtype: torch.dtype | None = None,
    accumulate: bool = True,
    keep: bool = False,
    callback: Callback | None = None,
) -> Trajectory:
    """Integrate `dx = v dt` from `x`; nothing here waits for the device.

    Args:
        velocity: Called as `velocity(k, x)` with the state before step k in `model_dtype`; returns
            B rows, or 2B when guided.
        x: State float32 `(B, N, C)`.
        dt: `(n, B)`, the lengths of the steps. Given apart from the times, whose differences have
            lost digits over short intervals.
        guidance: w, a number or `(B,)`.
        lengths: Valid frames per row, `(B,)`; frames beyond do not move.
        model_dtype: By default the state's.
        accumulate: Accumulate the displacement, apart from the state.
        keep: Keep all n + 1 states, and the displacements if they are accumulated.
        callback: Called as `callback(k, x)` after step k.
    """
    rows = x.shape[0]
    branches = 1 if guidance is None else 2
    dtype = model_dtype or x.dtype
    dt = dt.to(x.dtype)
    displacement = torch.zeros_like(x) if accumulate else None
    states, displacements = [x], [displacement]
    model_input = x.to(dtype)
    for k in range(dt.shape[0]):
        with span("sub-step"):
            with span("evaluation"):
                v = velocity(k, model_input)
            if v.shape[0] != branches * rows:
                raise ValueError(
                    f"cond: expected one prepared for {branches * rows} rows "
                    f"({'with' if branches == 2 else 'without'} guidance), "
                    f"got a velocity of {v.shape[0]} rows"
                )
            x, displacement, model_input = guided_euler_step(
                x,
                v,
                dt[k],
                guidance,
                lengths=lengths,
                displacement=displacement,
                model_dtype=dtype,
            )
        if keep:
            states.append(x)
            displacements.append(displacement)
        if callback is not None:
            callback(k, x)
    return Trajectory(
        x,
        displacement,
        torch.stack(states) if keep else None,
        torch.stack([d for d in displacements if d is not None]) if keep and accumulate else None,
    )


def solve(
    model: VelocityModel,
    x: Tensor,
    times: Tensor,
    dt: Tensor,
    cond: Any,
    guidance: Tensor | float | None = None,
    **options: Any,
) -> Trajectory:
    """`euler` of a model, asked at `t = times[k]`, `r = times[k + 1]`; times `(n + 1, B)`."""
    cond = laid_out(model, cond, x.shape[0])
    return euler(
        lambda k, state: model(state, times[k], times[k + 1], cond),
        x,
        dt,
        guidance,
        lengths=row_lengths(cond, x.shape[0]),
        model_dtype=model_dtype(model, x.dtype),
        **options,
    )


def model_dtype(model: Any, default: torch.dtype) -> torch.dtype:
    """The dtype that a model wants its state in: its `dtype` attribute, if it has one."""
    dtype = getattr(model, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else default


def laid_out(model: Any, cond: Any, rows: int) -> Any:
    """`cond` for the evaluations of one solve of so many rows, by models that have `lay_out`."""
    lay_out = getattr(model, "lay_out", None)
    return cond if lay_out is None else lay_out(cond, rows)


def row_lengths(cond: Any, rows: int) -> Tensor | None:
    """The lengths of the state's rows (the first half of a doubled conditioning), if any."""
    try:
        lengths = cond["lengths"]
    except (TypeError, KeyError, IndexError):
        return None
    return lengths[:rows]
