"""Batches as ops see them: frames of rows, padded or packed, with garbage where there is no row."""

from __future__ import annotations

import torch
from torch import Tensor

from imf_kernels.rows import Rows
from tests.ops.tools import DEVICE

LAYOUTS = ["padded", "packed"]


def layout(kind: str, lengths: list[int], spare: int = 3) -> tuple[Rows, int]:
    """The rows and the number of frames, `spare` of them of no row (per row, if padded)."""
    sizes = torch.tensor(lengths, device=DEVICE, dtype=torch.int64)
    longest = max(lengths, default=0)
    if kind == "padded":
        frames = longest + spare
        return Rows.padded(sizes, frames), len(lengths) * frames
    total = sum(lengths) + spare
    return Rows.packed(sizes, total, longest), total


def poisoned(x: Tensor, rows: Rows) -> Tensor:
    """`(T, ...)` with NaN in the frames of no row."""
    x[rows.row_of < 0] = torch.nan
    return x


def rows_of(x: Tensor, rows: Rows) -> list[Tensor]:
    """The frames of each row."""
    spans = zip(rows.starts[:-1].tolist(), rows.lengths.tolist(), strict=True)
    return [x[start : start + length] for start, length in spans]


def alone(length: int) -> Rows:
    return Rows.padded(torch.tensor([length], device=DEVICE), length)


def assert_nothing_else(x: Tensor, rows: Rows) -> None:
    """Frames of no row are exactly 0."""
    assert not x[rows.row_of < 0].any()
