"""A request's tensors: their checks, and the copies that bring them into static buffers.

A request holds B rows, as batches `(B, ...)` padded by the caller, or each row as a tensor of its
own size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from imf_kernels import checks
from imf_kernels.models.conditioning import Conditioning, TensorSpec
from imf_kernels.ops.ragged_copy import Copy, ragged_copy

Rows = Tensor | Sequence[Tensor]
"""A batch `(B, ...)`, or its rows."""

# -- checks ---------------------------------------------------------------------------------------


def check_noise(noise: Rows, channels: int) -> list[int]:
    """The frames of each row's noise."""
    if isinstance(noise, Tensor):
        checks.shape("noise", noise, "B", "N", channels)
        lengths = [noise.shape[1]] * noise.shape[0]
    else:
        for row in noise:
            checks.shape("noise", row, "N", channels)
        lengths = [row.shape[0] for row in noise]
    if not lengths or not min(lengths):
        raise ValueError(f"noise: expected rows of at least one frame, got {lengths}")
    for row in [noise] if isinstance(noise, Tensor) else noise:
        checks.dtype("noise", row, torch.float32)
    return lengths


def check_cond(
    cond: Any, specs: Mapping[str, TensorSpec], lengths: Sequence[int], guided: bool
) -> None:
    """Whether a conditioning is one of these rows and frames. Other kinds are not judged here."""
    if not isinstance(cond, Conditioning):
        return
    rows = (1 + guided) * len(lengths)
    if cond.rows != rows:
        raise ValueError(f"cond: expected {rows} prepared rows, got {cond.rows}")
    total = (1 + guided) * total_frames(lengths, guided, cond)
    for name, tensor in cond.items():
        if name in specs:
            checks.shape(f"cond's {name}", tensor, *specs[name].shape(rows, max(lengths), total))


def total_frames(
    lengths: Sequence[int],
    guided: bool,
    cond: Any = None,
    conditions: Mapping[str, Any] | None = None,
) -> int:
    """Valid frames of a request's rows in all, or a bound: nothing is read from the device."""
    if isinstance(cond, Conditioning) and "packed" in cond:
        return cond["packed"].shape[0] // (1 + guided)
    given = (conditions or {}).get("lengths")
    if isinstance(given, Tensor):
        given = given.tolist() if checks.readable(given) else None
    return sum(lengths if given is None else given)


def check_conditions(
    conditions: Mapping[str, Any], specs: Mapping[str, TensorSpec] | None, lengths: Sequence[int]
) -> None:
    """Whether these are the arguments of a model's `prepare` for rows of such noise."""
    if specs is None:
        raise ValueError("conditions: expected `cond`, the model declares no `inputs`")
    if set(conditions) | {"lengths"} != set(specs):
        raise ValueError(
            f"conditions: expected {sorted(specs)} (lengths may be left out), "
            f"got {sorted(conditions)}"
        )
    for name, value in conditions.items():
        if name == "lengths":
            _check_lengths(value, lengths)
            continue
        spec = specs[name]
        if _numbers(value, spec, len(lengths)):
            continue
        sizes = [max(lengths) if dim == "frames" else _free(dim) for dim in spec.dims[1:]]
        if isinstance(value, Tensor):
            checks.shape(name, value, len(lengths), *sizes)
        elif len(value) != len(lengths):
            raise ValueError(f"{name}: expected {len(lengths)} rows, got {len(value)}")
        else:
            for row, frames in zip(value, lengths, strict=True):
                checks.shape(name, row, *map(_free, spec.dims[1:]))
                _check_frames(name, row, spec, frames)
        for row in [value] if isinstance(value, Tensor) else value:
            if spec.dtype is not None and row.is_floating_point() != spec.dtype.is_floating_point:
                raise TypeError(f"{name}: expected {spec.dtype}, got {row.dtype}")


def _numbers(value: Any, spec: TensorSpec, rows: int) -> bool:
    """Whether a condition is a finite number for all rows, or one for each."""
    if isinstance(value, Tensor) or spec.dims != ("rows",):
        return False
    each = value if isinstance(value, list | tuple) else [value] * rows
    return len(each) == rows and all(
        isinstance(number, int | float) and math.isfinite(number) for number in each
    )


def _check_frames(name: str, row: Tensor, spec: TensorSpec, frames: int) -> None:
    if "frames" in spec.dims:
        given = row.shape[spec.dims.index("frames") - 1]
        if given != frames and not (spec.short and given < frames):
            wanted = f"at most {frames}" if spec.short else f"{frames}"
            raise ValueError(f"{name}: expected {wanted} frames, as its noise has, got {given}")


def _free(dim: str | int) -> str | int:
    return dim if isinstance(dim, int) else dim[0].upper()


def _check_lengths(value: Any, frames: Sequence[int]) -> None:
    if isinstance(value, Tensor):
        checks.lengths("lengths", value, len(frames), max(frames))
        if checks.readable(value):
            _check_lengths(value.tolist(), frames)
    elif value is not None and (
        len(value) != len(frames)
        or not all(1 <= length <= n for length, n in zip(value, frames, strict=True))
    ):
        raise ValueError(f"lengths: expected values from 1 to those of noise {frames}, got {value}")


def check_guidance(w: Any, rows: int) -> None:
    if isinstance(w, Tensor):
        checks.shape("guidance", w, rows)
        checks.dtype("guidance", w, torch.float32)
    elif isinstance(w, bool) or not isinstance(w, int | float) or not math.isfinite(w):
        raise ValueError(f"guidance: expected a finite number or a tensor (B,), got {w!r}")


# -- copies ---------------------------------------------------------------------------------------


def into(static: Tensor, rows: Rows | float, pad: float = 0.0) -> list[Copy]:
    """Copies of a batch, of rows of their own sizes, or of one number for all, into a buffer."""
    if isinstance(rows, Tensor):
        return [Copy(static, rows.to(static.dtype), pad)]
    if isinstance(rows, int | float):
        return [Copy(static, None, rows)]
    copies = [
        Copy(static[i], row.to(static.dtype), pad)
        if isinstance(row, Tensor)
        else Copy(static[i : i + 1], None, row)
        for i, row in enumerate(rows)
    ]
    if len(rows) < len(static):
        copies.append(Copy(static[len(rows) :], None, pad))
    return copies


def of_conditioning(static: Conditioning, cond: Conditioning, guided: bool) -> list[Copy]:
    """Copies of a prepared conditioning, each branch to its place."""
    copies = []
    for name, tensor in cond.items():
        spec = static.specs[name]
        if guided and spec.dims[0] in ("rows", "total"):
            pairs = zip(static[name].chunk(2), tensor.chunk(2), strict=True)
            copies += [copy for place, branch in pairs for copy in into(place, branch, spec.pad)]
        else:
            copies += into(static[name], tensor, spec.pad)
    return copies


def with_lengths(conditions: Mapping[str, Any], lengths: list[int]) -> Mapping[str, Any]:
    """Conditions with `lengths`: those of the rows' noise if none are given."""
    if conditions.get("lengths") is not None:
        return conditions
    return {**conditions, "lengths": lengths}


def batch(
    rows: Any, frames: int, spec: TensorSpec | None = None, device: torch.device | None = None
) -> Any:
    """Rows of their own sizes as one padded batch; a batch, or a number for all, as it is."""
    if isinstance(rows, Tensor | int | float):
        return rows
    if isinstance(rows[0], int | float):
        return torch.tensor(rows, dtype=None if spec is None else spec.dtype, device=device)
    if spec is None:
        spec = TensorSpec(("rows", "frames", rows[0].shape[-1]), torch.float32)
    padded = torch.empty(spec.shape(len(rows), frames), dtype=spec.dtype, device=rows[0].device)
    ragged_copy(into(padded, rows, spec.pad))
    return padded
