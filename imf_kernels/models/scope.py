"""Which frames those of an evaluation see: their rows' own, or also those that a cache holds.

Under the streaming mask, and with convolutions that look back only, a frame depends on its own
block and on those before, never on later ones. So a model that keeps every layer's keys and values,
and the last inputs of every convolution, evaluates new blocks alone, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from imf_kernels import checks
from imf_kernels.ops import attention, cached_attention
from imf_kernels.rows import Rows


class Whole(NamedTuple):
    """Rows from their first frame to their last.

    `chunk` `(R,)` is for the block-causal mask; frames where `silent` `(T,)` take nothing from
    attention, although they are attended to.
    """

    rows: Rows
    chunk: Tensor | None = None
    silent: Tensor | None = None

    def attend(self, qkv: Tensor) -> Tensor:
        """Attention from packed q, k, v `(T, 3, H, head_dim)` to `(T, H, head_dim)`."""
        return attention(qkv, self.rows, self.chunk, finite=True)

    def preceded(self, x: Tensor) -> Tensor:
        """A convolution's input `(T, C)` with the frames that it looks back to."""
        return x


class CacheSizes(NamedTuple):
    """What a family keeps: keys and values of `layers`, of each frame; of each row the last `lead`
    inputs of its convolutions, which have `widths` channels, in the order of evaluation. `chunk`
    is the frames of a block; `behind` how many frames back the conditions of one look."""

    layers: int
    heads: int
    head_dim: int
    lead: int
    widths: tuple[int, ...]
    chunk: int
    behind: int


class Cache:
    """Memory for rows of frames, of which a model remembers what later ones need.

    A row is a place among the frames and a slot: where both lie is the caller's to say.

    Attributes:
        kv: `(layers, frames + 1, 2, heads, head_dim)`; the last frame is nobody's.
        inputs: `(slots, lead * sum(widths))`; zeros are what lies before a row's first frame.
    """

    def __init__(
        self, sizes: CacheSizes, frames: int, slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        checks.positive_int("frames", frames)
        checks.positive_int("slots", slots)
        self.sizes = sizes
        shape = (sizes.layers, frames + 1, 2, sizes.heads, sizes.head_dim)
        self.kv = torch.empty(shape, dtype=dtype, device=device)
        self.inputs = self.kv.new_zeros(slots, sizes.lead * sum(sizes.widths))

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes + self.inputs.nbytes

    @property
    def nbytes_of_frame(self) -> int:
        return self.kv[:, 0].nbytes

    @property
    def nbytes_of_slot(self) -> int:
        return self.inputs[0].nbytes

    def forget(self, slots: Tensor) -> None:
        """Begin rows anew in these slots."""
        self.inputs.index_fill_(0, slots, 0.0)

    def extension(
        self,
        lengths: Sequence[int],
        before: Sequence[int],
        starts: Sequence[int],
        slots: Sequence[int],
    ) -> Extension:
        """New frames for one evaluation.

        Args:
            lengths: New frames of each row, 1 or more.
            before: The row's frames before them, all of which it has been extended by.
            starts: The row's first frame in `kv`; it is the caller's that rows do not overlap.
            slots: The row's slot.
        """
        rows = to_device([lengths, before, starts, slots], self.kv.device)
        return Extension(self, rows, sum(lengths), max(lengths), self.sizes.lead)


class Extension:
    """New frames of rows, each behind the last `lead` ones before, of which a cache holds more.

    For one evaluation: layers and convolutions take their parts of the cache in turn, and leave
    there what is new.

    Attributes:
        rows: The layout of the frames that are evaluated, packed, those in front included.
        new: Which of them are new, int64 `(total,)`.
        position: The place of each in its row, int64; nothing is known of those in front.
    """

    silent = None

    def __init__(self, cache: Cache, given: Tensor, total: int, longest: int, lead: int) -> None:
        """`given` is int64 `(4, R)`, the arguments of `Cache.extension` in their order."""
        self._arguments = cache, given, total, longest
        self._lead = lead
        lengths, before, starts, self._slots = given
        count = lengths.shape[0]
        self.rows = Rows.packed(lengths + lead, total + lead * count, longest + lead)
        row, place = self.rows.places()
        self.position = before[row] + place - lead
        in_front = place < lead
        row, place = Rows.packed(lengths, total, longest).places()
        first = self.rows.starts[:-1]
        self.new = first[row] + lead + place

        frame = torch.arange(lead, device=given.device)
        self._front = (first[:, None] + frame).flatten()
        self._last = (first + lengths).to(torch.int64)[:, None].add(frame).flatten()

        self._queries = Rows(
            F.pad(first + lead, (0, 1), value=self.rows.row_of.shape[0]),
            lengths.to(torch.int32),
            self.rows.row_of.masked_fill(in_front, -1),
            longest,
        )
        nobody = cache.kv.shape[1] - 1
        self._place = (starts[self.rows.row_of] + self.position).masked_fill(in_front, nobody)
        self._starts, self._lengths = starts.int(), (before + lengths).int()
        self._chunk = torch.full_like(lengths, cache.sizes.chunk)

        self._layers = iter(cache.kv)
        widths = [lead * width for width in cache.sizes.widths]
        self._inputs = iter(cache.inputs.split(widths, dim=1) if lead else ())

    def without_lead(self) -> Extension:
        """The same new frames alone, for layers that are no convolutions."""
        return Extension(*self._arguments, lead=0)

    def lay_out(self, x: Tensor) -> Tensor:
        """New frames `(total, ...)` among zeros for those in front of them."""
        return x.new_zeros(self.rows.row_of.shape[0], *x.shape[1:]).index_copy_(0, self.new, x)

    def attend(self, qkv: Tensor) -> Tensor:
        """As `Whole.attend`, of the new frames to all of their rows; 0 for those in front."""
        kv = next(self._layers)
        kv.index_copy_(0, self._place, qkv[:, 1:])
        return cached_attention(
            qkv[:, 0], kv, self._queries, self._starts, self._lengths, self._chunk
        )

    def preceded(self, x: Tensor) -> Tensor:
        """As `Whole.preceded`: `x` is overwritten where frames lie in front."""
        kept = next(self._inputs).unflatten(1, (self._lead, -1))
        x.index_copy_(0, self._front, kept[self._slots].flatten(0, 1))
        kept.index_copy_(0, self._slots, x[self._last].unflatten(0, (-1, self._lead)))
        return x


Scope = Whole | Extension


def to_device(values: Sequence[Any], device: torch.device) -> Tensor:
    """Integers, in nested lists, as int64, without waiting for the device."""
    cuda = device.type == "cuda"
    return torch.tensor(values, dtype=torch.int64, pin_memory=cuda).to(device, non_blocking=cuda)
