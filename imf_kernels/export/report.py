"""What was written, and how far it is from eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from imf_kernels.export.program import Exportable

LENGTHS = ((16,), (61,), (250, 97, 5))
"""Of the rows that a file is checked on, which are not those that were traced."""


class Report(NamedTuple):
    """A file, its inputs in order, and its largest error against eager over `lengths`.

    The error is the RMS of the difference over that of eager's result.
    """

    path: Path
    nbytes: int
    inputs: tuple[str, ...]
    lengths: tuple[tuple[int, ...], ...]
    relative_rms: float


def checked(
    path: Path,
    subject: Exportable,
    run: Callable[[list[Tensor]], Tensor],
    rows: int,
    frames: int,
    bound: float | None,
) -> Report:
    """Compare `run`, of the file, with the module itself on its own kernels.

    Raises:
        RuntimeError: an error beyond the bound.
    """
    if bound is None:
        bound = 1e-4 if subject.dtype == torch.float32 else 0.05
    lengths = tuple(dict.fromkeys(_within(batch, rows, frames) for batch in LENGTHS))
    worst = max(_error(subject, run, batch) for batch in lengths)
    if not worst <= bound:  # NaN is beyond it
        raise RuntimeError(
            f"bound: expected results within a relative RMS of {bound} of eager's, got {worst}"
        )
    return Report(path, path.stat().st_size, tuple(subject.dims), lengths, worst)


def _within(batch: Sequence[int], rows: int, frames: int) -> tuple[int, ...]:
    return tuple(min(length, frames) for length in batch[:rows])


def _error(
    subject: Exportable, run: Callable[[list[Tensor]], Tensor], lengths: Sequence[int]
) -> float:
    inputs = list(subject.example(lengths).values())
    with torch.no_grad():
        wanted = subject(*inputs)
    difference = run(inputs).to(wanted) - wanted
    return float(difference.square().mean().sqrt() / wanted.square().mean().sqrt())
