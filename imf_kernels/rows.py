"""Where the rows of a batch lie among its frames: side by side in padding, or packed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Rows(NamedTuple):
    """R rows within T frames: row i is the frames `[starts[i], starts[i] + lengths[i])`.

    `starts` is int32 `(R + 1,)`, ascending, its last entry no less than the end of the last row
    (flash attention's `cu_seqlens`); `lengths` is int32 `(R,)`; `row_of` is int32 `(T,)`, the row
    of each frame, -1 for padding; `longest` is an integer that no length exceeds. Nothing else is
    ever read of a layout, so padded and packed batches run the same kernels.
    """

    starts: Tensor
    lengths: Tensor
    row_of: Tensor
    longest: int

    @staticmethod
    def padded(lengths: Tensor, frames: int) -> Rows:
        """R rows of `frames` frames each, of which the first `lengths` are valid."""
        row = torch.arange(lengths.shape[0] + 1, dtype=torch.int32, device=lengths.device)
        row_of = row[:-1, None].expand(-1, frames).masked_fill(_outside(lengths, frames), -1)
        lengths = lengths.to(torch.int32).contiguous()
        return Rows(row * frames, lengths, row_of.flatten(), frames)

    @staticmethod
    def packed(lengths: Tensor, total: int, longest: int) -> Rows:
        """Rows one after the other among `total` frames; the frames after the last are padding.

        What does not fit is cut: the last rows of a static buffer are nobody's.
        """
        starts = F.pad(lengths.cumsum(0, dtype=torch.int32).clamp(max=total), (1, 0))
        frame = torch.arange(total, dtype=torch.int32, device=lengths.device)
        row_of = torch.searchsorted(starts[1:], frame, right=True, out_int32=True)
        row_of = row_of.masked_fill(row_of == lengths.shape[0], -1)
        return Rows(starts, starts.diff(), row_of, longest)

    def repeat(self, times: int) -> Rows:
        """The same layout several times over, each a batch of its own."""
        if times == 1:
            return self
        rows, frames, outside = self.lengths.shape[0], self.row_of.shape[0], self.row_of < 0
        ahead = range(1, times)
        row_of = [(self.row_of + i * rows).masked_fill(outside, -1) for i in ahead]
        starts = [self.starts[:-1], *(self.starts[:-1] + i * frames for i in ahead[:-1])]
        return Rows(
            torch.cat([*starts, self.starts + (times - 1) * frames]),
            self.lengths.repeat(times),
            torch.cat([self.row_of, *row_of]),
            self.longest,
        )

    def places(self) -> tuple[Tensor, Tensor]:
        """Each frame's row and its place there, `(T,)`; a frame of none is put behind row 0."""
        row = self.row_of.clamp(min=0)
        frame = torch.arange(self.row_of.shape[0], device=row.device)
        return row, frame - self.starts[row]

    def pack(self, x: Tensor) -> Tensor:
        """The frames `(T, ...)` of a padded batch `(R, N, ...)`; those of no row mean nothing, and
        are finite if the rows are."""
        frame = torch.arange(self.row_of.shape[0], device=x.device)
        place = torch.add(frame, self.row_of, alpha=x.shape[1]) - self.starts[self.row_of]
        return x.flatten(0, 1).index_select(0, place.masked_fill(self.row_of < 0, 0))

    def unpack(self, x: Tensor, frames: int) -> Tensor:
        """The padded batch `(R, frames, ...)` of frames `(T, ...)`; 0 beyond each row's length."""
        frame = torch.arange(frames, device=x.device)
        outside = frame >= self.lengths[:, None]
        place = (self.starts[:-1, None] + frame).masked_fill(outside, 0)
        return _cleared(x.index_select(0, place.flatten()).unflatten(0, outside.shape), outside)


def _outside(lengths: Tensor, frames: int) -> Tensor:
    return torch.arange(frames, device=lengths.device) >= lengths[:, None]


def _cleared(x: Tensor, outside: Tensor) -> Tensor:
    """Zero where `outside`, whatever `x` holds there."""
    return x.masked_fill(outside[(...,) + (None,) * (x.ndim - outside.ndim)], 0.0)
