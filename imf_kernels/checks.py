"""Checks at the public door: each error names the argument, the expectation and the value.

Shapes and dtypes are always checked. Values are checked on CPU tensors only: reading a CUDA
tensor would wait for the device.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shape(name: str, tensor: Tensor, *dims: int | str) -> None:
    """`dims` holds sizes, or letters for sizes that are free."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    fits = tensor.ndim == len(dims) and all(
        isinstance(want, str) or got == want for got, want in zip(tensor.shape, dims, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(dim) for dim in dims) + ("," if len(dims) == 1 else "")
        raise ValueError(f"{name}: expected shape ({wanted}), got {tuple(tensor.shape)}")


def dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(item) for item in allowed)
        raise TypeError(f"{name}: expected {wanted}, got {tensor.dtype}")


def floating(name: str, tensor: Tensor) -> None:
    dtype(name, tensor, *FLOATING)


def same_device(name: str, tensor: Tensor | None, device: torch.device) -> None:
    """None passes: an optional tensor that was not given is nowhere."""
    if tensor is not None and tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")


def device(name: str, value: torch.device | str) -> torch.device:
    """The device of that name, with its index, if tensors can be put there."""
    try:
        return torch.empty(0, device=value).device
    except (RuntimeError, AssertionError) as error:  # the second: torch is built without it
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{name}: expected one that is there, got {str(value)!r}: {reason}"
        ) from error


def positive_int(name: str, value: int) -> None:
    whole(name, value, 1)


def whole(name: str, value: int, least: int, most: int | None = None) -> None:
    """An integer of at least `least`, and at most `most` if given."""
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not fits or (most is not None and value > most):
        bounds = f">= {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"{name}: expected an integer {bounds}, got {value!r}")


def number(name: str, value: float, least: float = -math.inf, most: float = math.inf) -> None:
    if not isinstance(value, Real) or not math.isfinite(value) or not least <= value <= most:
        bounds = "" if math.isinf(least) else f" in [{least}, {most}]"
        raise ValueError(f"{name}: expected a finite number{bounds}, got {value!r}")


def choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        wanted = ", ".join(str(item) for item in allowed)
        raise ValueError(f"{name}: expected one of {wanted}, got {value!r}")


def readable(*tensors: Tensor | None) -> bool:
    """Whether values may be read: on the CPU, and not while a graph is being traced."""
    return not torch.compiler.is_compiling() and all(
        tensor is None or tensor.device.type == "cpu" for tensor in tensors
    )


def lengths(name: str, value: Tensor, rows: int, frames: int) -> None:
    shape(name, value, rows)
    dtype(name, value, torch.int64, torch.int32)
    if readable(value) and rows and not (int(value.min()) >= 1 and int(value.max()) <= frames):
        raise ValueError(f"{name}: expected values in [1, {frames}], got {value.tolist()}")


def interval(t: Tensor, r: Tensor, rows: int, *, strict: bool = False) -> None:
    """Times of `rows` intervals, float32 (or float64) `(rows,)`: 0 <= t <= r <= 1.

    `strict` asks for t < r.
    """
    for name, value in (("t", t), ("r", r)):
        shape(name, value, rows)
        dtype(name, value, torch.float32, torch.float64)
    if not readable(t, r):
        return
    for name, value in (("t", t), ("r", r)):
        if not bool(((value >= 0) & (value <= 1)).all()):
            raise ValueError(f"{name}: expected times in [0, 1], got {value.tolist()}")
    if not bool((t <= r).all()):
        raise ValueError(f"t: expected t <= r, got t = {t.tolist()}, r = {r.tolist()}")
    if strict and not bool((t < r).all()):
        raise ValueError(
            f"r: expected r > t (at r = t the displacement over the length is 0/0), "
            f"got t = {t.tolist()}, r = {r.tolist()}"
        )


def guidance(w: Tensor | float | None, state: Tensor) -> None:
    """Raises unless `w` is None, a finite number, or a tensor `(B,)` of the state's dtype."""
    if isinstance(w, Tensor):
        shape("guidance", w, state.shape[0])
        dtype("guidance", w, state.dtype)
        same_device("guidance", w, state.device)
    elif w is not None and not (isinstance(w, int | float) and _finite(w)):
        raise ValueError(f"guidance: expected a finite number or a tensor (B,), got {w!r}")


def _finite(value: float) -> bool:
    return torch.compiler.is_compiling() or math.isfinite(value)


def state(name: str, x: Tensor) -> None:
    """A state `(B, N, C)`, float32 (or, for checks, float64)."""
    shape(name, x, "B", "N", "C")
    dtype(name, x, torch.float32, torch.float64)
