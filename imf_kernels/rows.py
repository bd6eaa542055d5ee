"""Where the rows of a batch lie among its frames: side by side in padding, or packed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from imf_kernels import masks


class Rows(NamedTuple):
    """R rows within T frames: row i is the frames `[starts[i], starts[i] + lengths[i])`.

    `starts` and `lengths` are int32 `(R,)`; `row_of` is int32 `(T,)`, the row of each frame, -1 for
    padding; `longest` is an integer that no length exceeds. Nothing else is ever read of a layout,
    so padded and packed batches run the same kernels.
    """

    starts: Tensor
    lengths: Tensor
    row_of: Tensor
    longest: int

    @staticmethod
    def padded(lengths: Tensor, frames: int) -> Rows:
        """R rows of `frames` frames each, of which the first `lengths` are valid."""
        count, device = lengths.shape[0], lengths.device
        row = torch.arange(count, dtype=torch.int32, device=device)
        row_of = torch.where(masks.inside(lengths, frames), row[:, None], -1).flatten()
        return Rows(row * frames, lengths.to(torch.int32), row_of, frames)

    @staticmethod
    def packed(lengths: Tensor, total: int, longest: int) -> Rows:
        """Rows one after the other among `total` frames; the frames after the last are padding."""
        ends = lengths.cumsum(0)
        frame = torch.arange(total, device=lengths.device)
        row_of = torch.searchsorted(ends, frame, right=True).to(torch.int32)
        row_of = torch.where(row_of < lengths.shape[0], row_of, -1)
        return Rows((ends - lengths).to(torch.int32), lengths.to(torch.int32), row_of, longest)
