"""Where the rows of a batch lie among its frames: side by side in padding, or packed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from imf_kernels import masks


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
        count, device = lengths.shape[0], lengths.device
        row = torch.arange(count + 1, dtype=torch.int32, device=device)
        row_of = torch.where(masks.inside(lengths, frames), row[:-1, None], -1).flatten()
        return Rows(row * frames, lengths.to(torch.int32), row_of, frames)

    @staticmethod
    def packed(lengths: Tensor, total: int, longest: int) -> Rows:
        """Rows one after the other among `total` frames; the frames after the last are padding.

        What does not fit is cut: the last rows of a static buffer are nobody's.
        """
        starts = F.pad(lengths.cumsum(0).clamp(max=total), (1, 0)).to(torch.int32)
        frame = torch.arange(total, dtype=torch.int32, device=lengths.device)
        row_of = torch.searchsorted(starts[1:], frame, right=True, out_int32=True)
        row_of = torch.where(row_of < lengths.shape[0], row_of, -1)
        return Rows(starts, starts.diff(), row_of, longest)

    def repeat(self, times: int) -> Rows:
        """The same layout several times over, each a batch of its own."""
        if times == 1:
            return self
        copy = torch.arange(times, dtype=torch.int32, device=self.row_of.device)[:, None]
        starts = (self.starts[:-1] + copy * self.row_of.shape[0]).flatten()
        row_of = self.row_of + copy * self.lengths.shape[0]
        return Rows(
            F.pad(starts, (0, 1), value=times * self.row_of.shape[0]),
            self.lengths.repeat(times),
            torch.where(self.row_of < 0, -1, row_of).flatten(),
            self.longest,
        )

    def pack(self, x: Tensor) -> Tensor:
        """The frames `(T, ...)` of a padded batch `(R, N, ...)`; those of no row are 0."""
        frame = torch.arange(self.row_of.shape[0], device=x.device)
        row = self.row_of.clamp(min=0)
        place = row * x.shape[1] + frame - self.starts[row]
        packed = x.flatten(0, 1).index_select(0, torch.where(self.row_of < 0, 0, place))
        return _filled(packed, self.row_of < 0)

    def unpack(self, x: Tensor, frames: int) -> Tensor:
        """The padded batch `(R, frames, ...)` of frames `(T, ...)`; 0 beyond each row's length."""
        inside = masks.inside(self.lengths, frames)
        place = self.starts[:-1, None] + torch.arange(frames, device=x.device)
        place = torch.where(inside, place, 0).flatten()
        return _filled(x.index_select(0, place).unflatten(0, inside.shape), ~inside)


def _filled(x: Tensor, outside: Tensor) -> Tensor:
    """Zero where `outside`, whatever `x` holds there."""
    return x.masked_fill(outside[(...,) + (None,) * (x.ndim - outside.ndim)], 0.0)
