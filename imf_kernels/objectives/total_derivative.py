"""du/dt of a student along `dz/dt = v`, r fixed: by forward-mode AD, or by a difference.

Both in float32 proper, without gradient, autocast or TF32. Embeddings of `1000 t` turn fast: to be
the derivative, the difference wants steps of 1e-4 or less, over which half precision has no digits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from imf_kernels import dispatch
from imf_kernels.objectives.batch import Batch
from imf_kernels.objectives.students import Prepared

STEP = 1e-4


def jvp(student: Any, batch: Batch, z: Tensor, t: Tensor, r: Tensor, v: Tensor) -> Tensor:
    """Exact. Forward-mode AD needs reference ops and attention with its scores in memory.

    Asks the student within its wrapper: DistributedDataParallel leaves its weights whole, and
    without gradient there is nothing to synchronise.
    """
    with _exact(student, batch, z) as prepared, contextlib.ExitStack() as scopes:
        scopes.enter_context(dispatch.backend("reference"))
        scopes.enter_context(sdpa_kernel(SDPBackend.MATH))
        scopes.enter_context(torch.compiler.set_stance("force_eager"))
        scopes.enter_context(forward_ad.dual_level())
        z = forward_ad.make_dual(z, v)
        t = forward_ad.make_dual(t, torch.ones_like(t))
        u, tangent = forward_ad.unpack_dual(prepared(z, t, r, inner=True))
        _check(u)
        return torch.zeros_like(u) if tangent is None else tangent.clone()


def difference(
    student: Any,
    batch: Batch,
    z: Tensor,
    t: Tensor,
    r: Tensor,
    v: Tensor,
    *,
    step: float = STEP,
    u: Tensor | None = None,
) -> Tensor:
    """Of two evaluations on any ops, at `t - step` and `t + step`, both within `[0, r]`.

    Given `u`, the student at `(z, t, r)`, of one, at `t + step`. 0 where the two are at one time.
    """
    after = torch.minimum(t + step, r)
    before = t if u is not None else (t - step).clamp(min=0)
    length = after - before
    with _exact(student, batch, z) as prepared:

        def at(time: Tensor) -> Tensor:
            return _check(prepared(z + (time - t)[:, None, None] * v, time, r))

        change = at(after) - (at(before) if u is None else u.detach())
        return change / length.masked_fill(length == 0, 1.0)[:, None, None]


def verify(student: Any, batch: Batch, z: Tensor, v: Tensor) -> None:
    """Compare both on this batch, away from the ends of time.

    Raises:
        RuntimeError: they disagree: an op of the student has no forward-mode derivative and does
            not say so, or the wrapper makes another function of it, or it is not deterministic.
    """
    t, r = (z.new_full((len(z),), time) for time in (0.4, 0.6))
    valid = batch.valid()[:, :, None]
    got = jvp(student, batch, z, t, r, v).masked_fill(~valid, 0.0)
    want = difference(student, batch, z, t, r, v).masked_fill(~valid, 0.0)
    error, size = float((got - want).norm()), float(want.norm())
    with _exact(student, batch, z) as prepared:
        level = float(prepared(z, t, r).norm())  # a difference's rounding is less than 1 % of it
    if not error <= 0.05 * (size + level):
        raise RuntimeError(
            "student: expected a forward-mode derivative that agrees with a difference, got one "
            f"{error:.3g} away from {size:.3g}: an op drops tangents (a custom op without a jvp, "
            "`detach`), or dropout is on. derivative='difference' needs no such derivative"
        )


def _check(u: Tensor) -> Tensor:
    if u.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"student: expected float32 weights, over small steps in t, got a velocity in {u.dtype}"
        )
    return u


@contextlib.contextmanager
def _exact(student: Any, batch: Batch, z: Tensor) -> Iterator[Prepared]:
    """The student, without gradient, as exactly as its weights allow."""
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False), _without_tf32():
        yield Prepared(student, batch)


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    switches = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
