"""One guided Euler step in one pass: guidance, state, displacement and the next model input.

    g    = v_u + w (v_c - v_u)                 classifier-free guidance, w = 1 means none
    step = sum_s dt_s g_s                      over the substeps held (usually one)
    x'   = x + step,  displacement' = displacement + step

Everything is computed in the state's dtype, float32. The displacement is kept apart from the state:
over a short interval `x' - x` has lost the digits that `sum dt g` still has (IntMeanFlow, arXiv
2510.07979, Eq. 4-6).

Both branches' velocities are read here. The last projection is linear, so that guidance could come
before it: that would save .2 % of the bytes of a guided evaluation of F5-TTS base, .02 % of its
FLOPs and no launch, for a second form of the last norm.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from imf_kernels import checks, dispatch, masks
from imf_kernels.ops._layout import contiguous
from imf_kernels.ops._triton import accumulator, cdiv, jit, launch, tl, wait_for_predecessor

BLOCK = 1024


class EulerStep(NamedTuple):
    """What a step returns; `model_input` is the state in the model's dtype."""

    x: Tensor
    displacement: Tensor | None
    model_input: Tensor


def reference(
    x: Tensor,
    velocity: Tensor,
    dt: Tensor,
    guidance: Tensor | float | None = None,
    *,
    lengths: Tensor | None = None,
    displacement: Tensor | None = None,
    model_dtype: torch.dtype | None = None,
) -> EulerStep:
    """Plain PyTorch, the specification: shapes as in `guided_euler_step`, substeps held."""
    rows = x.shape[0]
    v = velocity.to(x.dtype)
    if guidance is not None:
        w = guidance.view(-1, 1, 1) if isinstance(guidance, Tensor) else guidance
        conditional, unconditional = v[:, :rows], v[:, rows:]
        v = unconditional + w * (conditional - unconditional)
    scaled = dt[:, :, None, None] * v
    step = scaled[0]
    for substep in scaled[1:]:
        step = step + substep
    if lengths is not None:
        step = _zero_beyond(lengths, step)
    x = x + step
    if displacement is not None:
        displacement = displacement + step
    return EulerStep(x, displacement, x.to(model_dtype or x.dtype))


def _zero_beyond(lengths: Tensor, step: Tensor) -> Tensor:
    return step.masked_fill(~masks.inside(lengths, step.shape[1])[:, :, None], 0.0)


@jit(do_not_specialize=["frames", "scale"])
def _guided_euler_step_kernel(
    p_x,
    p_v,
    p_dt,
    p_guidance,
    p_lengths,
    p_displacement,
    p_x_out,
    p_displacement_out,
    p_model_input,
    scale,
    rows,
    frames,
    CHANNELS: tl.constexpr,
    SUBSTEPS: tl.constexpr,
    GUIDED: tl.constexpr,
    HAS_GUIDANCE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_DISPLACEMENT: tl.constexpr,
    HAS_MODEL_INPUT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_predecessor()
    row = tl.program_id(1).to(tl.int64)
    row_size = frames.to(tl.int64) * CHANNELS
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < row_size
    m_valid = m
    if HAS_LENGTHS:
        m_valid = m & (o < tl.load(p_lengths + row).to(tl.int64) * CHANNELS)
    if HAS_GUIDANCE:  # noqa: SIM108 (a ternary would load both)
        w = tl.load(p_guidance + row)
    else:
        w = scale

    b_step = tl.zeros([BLOCK], ACC)
    v_rows = 2 * rows if GUIDED else rows
    for s in tl.static_range(SUBSTEPS):
        p_row = p_v + (s * v_rows + row) * row_size
        b_v = tl.load(p_row + o, mask=m_valid, other=0.0).to(ACC)
        if GUIDED:
            b_u = tl.load(p_row + rows * row_size + o, mask=m_valid, other=0.0).to(ACC)
            b_v = b_u + w * (b_v - b_u)
        b_step += tl.load(p_dt + s * rows + row) * b_v

    o_out = row * row_size + o
    b_x = tl.load(p_x + o_out, mask=m, other=0.0) + b_step
    tl.store(p_x_out + o_out, b_x, mask=m)
    if HAS_DISPLACEMENT:
        b_d = tl.load(p_displacement + o_out, mask=m, other=0.0) + b_step
        tl.store(p_displacement_out + o_out, b_d, mask=m)
    if HAS_MODEL_INPUT:
        tl.store(p_model_input + o_out, b_x.to(p_model_input.dtype.element_ty), mask=m)


def _outputs(
    x: Tensor, displacement: Tensor | None, model_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous outputs; an output that was not asked for is an empty tensor."""
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape if displacement is not None else (0,)),
        x.new_empty(x.shape if model_dtype is not None else (0,), dtype=model_dtype),
    )


def _launch(
    x: Tensor,
    velocity: Tensor,
    dt: Tensor,
    guidance: Tensor | None,
    scale: float,
    lengths: Tensor | None,
    displacement: Tensor | None,
    model_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, frames, channels = x.shape
    outputs = _outputs(x, displacement, model_dtype)
    launch(
        _guided_euler_step_kernel,
        (cdiv(frames * channels, BLOCK), rows),
        x,
        velocity,
        dt,
        guidance,
        lengths,
        displacement,
        *outputs,
        float(scale),
        rows,
        frames,
        CHANNELS=channels,
        SUBSTEPS=velocity.shape[0],
        GUIDED=velocity.shape[1] != rows,
        HAS_GUIDANCE=guidance is not None,
        HAS_LENGTHS=lengths is not None,
        HAS_DISPLACEMENT=displacement is not None,
        HAS_MODEL_INPUT=model_dtype is not None,
        ACC=accumulator(x),
        BLOCK=BLOCK,
        num_warps=4,
    )
    return outputs


@torch.library.custom_op("imf_kernels::guided_euler_step", mutates_args=())
def _op(
    x: Tensor,
    velocity: Tensor,
    dt: Tensor,
    guidance: Tensor | None,
    scale: float,
    lengths: Tensor | None,
    displacement: Tensor | None,
    model_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    x, velocity, dt, guidance, lengths, displacement = contiguous(
        x, velocity, dt, guidance, lengths, displacement
    )
    args = (x, velocity, dt, guidance, scale, lengths, displacement, model_dtype)
    if dispatch.runs_triton(x):
        return _launch(*args)
    if dispatch.HAS_EXTENSION and x.dtype == torch.float32:
        lengths = None if lengths is None else lengths.long()
        return torch.ops.imf_kernels.guided_euler_step_cpu(*args[:5], lengths, *args[6:])
    guided = velocity.shape[1] != x.shape[0]
    step = reference(
        x,
        velocity,
        dt,
        (scale if guidance is None else guidance) if guided else None,
        lengths=lengths,
        displacement=displacement,
        model_dtype=model_dtype,
    )
    empty = x.new_empty((0,))
    return (
        step.x,
        empty if step.displacement is None else step.displacement,
        x.new_empty((0,)) if model_dtype is None else step.model_input,
    )


@_op.register_fake
def _(x, velocity, dt, guidance, scale, lengths, displacement, model_dtype):
    return _outputs(x, displacement, model_dtype)


def _setup_context(ctx, inputs, output):
    _, velocity, dt, guidance, scale, lengths, displacement, model_dtype = inputs
    ctx.save_for_backward(dt, guidance, lengths)
    ctx.scale, ctx.velocity_shape, ctx.velocity_dtype = scale, velocity.shape, velocity.dtype
    ctx.has_displacement, ctx.has_model_input = displacement is not None, model_dtype is not None


def _backward(ctx, grad_x, grad_displacement, grad_model_input):
    dt, guidance, lengths = ctx.saved_tensors
    if ctx.has_model_input:
        grad_x = grad_x + grad_model_input.to(grad_x.dtype)
    grad_step = grad_x + grad_displacement if ctx.has_displacement else grad_x
    if lengths is not None:
        grad_step = _zero_beyond(lengths, grad_step)
    grad_v = dt[:, :, None, None] * grad_step
    if ctx.velocity_shape[1] != grad_x.shape[0]:
        w = ctx.scale if guidance is None else guidance.view(-1, 1, 1)
        grad_v = torch.cat([w * grad_v, (1 - w) * grad_v], dim=1)
    grad_v = grad_v.to(ctx.velocity_dtype)
    grad_d = grad_displacement if ctx.has_displacement else None
    return grad_x, grad_v, None, None, None, None, grad_d, None


_op.register_autograd(_backward, setup_context=_setup_context)


def guided_euler_step(
    x: Tensor,
    velocity: Tensor,
    dt: Tensor,
    guidance: Tensor | float | None = None,
    *,
    lengths: Tensor | None = None,
    displacement: Tensor | None = None,
    model_dtype: torch.dtype | None = None,
) -> EulerStep:
    """Advance the state by one Euler step of a (guided) velocity, in one pass.

    Args:
        x: State `(B, N, C)`, float32 (float64 for checks; the other float32 arguments follow it).
        velocity: `(R, N, C)` or, with S substeps held, `(S, R, N, C)`, any floating dtype.
            R = B unguided; R = 2B guided, rows `[0:B]` conditional, `[B:2B]` unconditional.
        dt: Step lengths, float32 `(B,)`, or `(S, B)` with substeps held.
        guidance: w, a number or float32 `(B,)`; given if and only if R = 2B.
        lengths: Valid frames per row, integer `(B,)`; beyond them nothing moves.
        displacement: Accumulated displacement, float32 `(B, N, C)`, or None.
        model_dtype: Dtype of the returned `model_input`; by default the state's.

    Returns:
        `EulerStep(x, displacement, model_input)`. In the state's dtype `model_input` is `x` itself.

    Gradients pass to `x`, `velocity` and `displacement`.

    Raises:
        ValueError, TypeError: naming the argument, the expected and the given value.
    """
    for name, value in (("x", x), ("velocity", velocity), ("dt", dt)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if velocity.ndim == 3 and dt.ndim == 1:
        velocity, dt = velocity[None], dt[None]
    model_dtype = model_dtype or x.dtype
    _check(x, velocity, dt, guidance, lengths, displacement, model_dtype)
    if not isinstance(guidance, Tensor | None) and x.dtype == torch.float64:
        guidance = x.new_full((x.shape[0],), guidance)  # a kernel takes numbers in float32
    given = guidance if isinstance(guidance, Tensor) else None
    if not dispatch.use_kernel(x, velocity, dt, given, displacement, cpp=True):
        return reference(
            x,
            velocity,
            dt,
            guidance,
            lengths=lengths,
            displacement=displacement,
            model_dtype=model_dtype,
        )
    new_x, new_displacement, model_input = _op(
        x,
        velocity,
        dt,
        given,
        1.0 if guidance is None or given is not None else float(guidance),
        lengths,
        displacement,
        None if model_dtype == x.dtype else model_dtype,
    )
    return EulerStep(
        new_x,
        None if displacement is None else new_displacement,
        new_x if model_dtype == x.dtype else model_input,
    )


def _check(
    x: Tensor,
    velocity: Tensor,
    dt: Tensor,
    guidance: Tensor | float | None,
    lengths: Tensor | None,
    displacement: Tensor | None,
    model_dtype: torch.dtype,
) -> None:
    checks.state("x", x)
    rows, frames, channels = x.shape
    checks.shape(
        "velocity", velocity, "S", rows if guidance is None else 2 * rows, frames, channels
    )
    checks.floating("velocity", velocity)
    checks.same_device("velocity", velocity, x.device)
    if velocity.shape[0] < 1:
        raise ValueError(f"velocity: expected at least one substep, got {tuple(velocity.shape)}")
    checks.shape("dt", dt, velocity.shape[0], rows)
    checks.dtype("dt", dt, x.dtype)
    checks.same_device("dt", dt, x.device)
    checks.guidance(guidance, x)
    for name, value in (("dt", dt), ("guidance", guidance)):
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"{name}: expected a tensor without gradient, got requires_grad=True")
    if lengths is not None:
        checks.lengths("lengths", lengths, rows, frames)
        checks.same_device("lengths", lengths, x.device)
    if displacement is not None:
        checks.shape("displacement", displacement, rows, frames, channels)
        checks.dtype("displacement", displacement, x.dtype)
        checks.same_device("displacement", displacement, x.device)
    checks.choice("model_dtype", model_dtype, checks.FLOATING)
