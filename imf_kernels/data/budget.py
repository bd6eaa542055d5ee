"""Batches of similar lengths within a number of frames, in another order every epoch.

Sorted lengths are cut into batches once: so every epoch has the same number of them, and a position
tells its epoch by division. Each epoch draws who of the same length goes where, and the batches'
order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imf_kernels import checks, seeds


class Budget:
    """The batches of each rank, as numbers of utterances.

    Every utterance comes once an epoch; but the batches that would leave ranks uneven, fewer than
    `ranks` and others each epoch, are left out of it.

    Args:
        lengths: Frames of each utterance.
        frames: What a batch may have: rows times the longest, or if `packed` their sum.
        max_rows: What it may have besides; None: any number of rows.
        ranks: Processes that share an epoch.
        drop_long: Leave out utterances of more than `frames`, which `left_out` counts.
        names: For errors; None: utterances are numbers there too.

    Raises:
        ValueError: naming the argument, the expected and the given value: among others an utterance
            longer than `frames`, and fewer batches than ranks.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Tensor,
        frames: int,
        *,
        max_rows: int | None = None,
        packed: bool = False,
        seed: int = 0,
        ranks: int = 1,
        drop_long: bool = False,
        names: Sequence[str] | None = None,
    ) -> None:
        checks.positive_int("frames", frames)
        checks.positive_int("ranks", ranks)
        if max_rows is not None:
            checks.positive_int("max_rows", max_rows)
        self.seed, self.ranks = seed, ranks
        self._lengths = torch.as_tensor(lengths, dtype=torch.int32)
        kept = self._lengths <= frames
        if bool((self._lengths < 1).any()):
            worst = _name(int(self._lengths.argmin()), names)
            raise ValueError(f"lengths: expected a frame or more each, got none for {worst}")
        if not drop_long and not bool(kept.all()):
            longest = int(self._lengths.argmax())
            raise ValueError(
                f"frames: expected no fewer than the longest utterance, or drop_long, got {frames} "
                f"for {int((~kept).sum())} longer ones, the longest {_name(longest, names)} of "
                f"{int(self._lengths[longest])}"
            )
        self._kept = kept.nonzero().flatten().int()
        self.left_out = len(kept) - len(self._kept)
        ascending = self._lengths[self._kept].sort().values
        self._cuts = _cuts(ascending, frames, max_rows, packed)
        self._per_rank = (len(self._cuts) - 1) // ranks
        if not self._per_rank:
            raise ValueError(
                f"ranks: expected no more than the {len(self._cuts) - 1} batches that "
                f"{len(self._kept)} utterances make, got {ranks}"
            )
        self._drawn: tuple[int, Tensor, list[int]] | None = None

    def __len__(self) -> int:
        """Batches of one rank in one epoch."""
        return self._per_rank

    @property
    def count(self) -> int:
        """Utterances that are not left out."""
        return len(self._kept)

    @property
    def total(self) -> int:
        """Their frames."""
        return int(self._lengths[self._kept].sum())

    def batch(self, rank: int, position: int) -> list[int]:
        """The utterances that a rank takes after `position` batches, of all epochs."""
        epoch, place = divmod(position, self._per_rank)
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = (epoch, *self._draw(epoch))
        _, utterances, batches = self._drawn
        cut = batches[place * self.ranks + rank]
        return utterances[self._cuts[cut] : self._cuts[cut + 1]].tolist()

    def _draw(self, epoch: int) -> tuple[Tensor, list[int]]:
        """The utterances by length, equal ones in random order; and the batches' order."""
        generator = torch.Generator().manual_seed(seeds.seed(self.seed, epoch))
        mixed = self._kept[torch.randperm(len(self._kept), generator=generator)]
        ascending = mixed[self._lengths[mixed].argsort(stable=True)]
        return ascending, torch.randperm(len(self._cuts) - 1, generator=generator).tolist()


def _cuts(ascending: Tensor, frames: int, max_rows: int | None, packed: bool) -> list[int]:
    """Where batches begin, and the end: as many rows in each as fit."""
    count, cuts = len(ascending), [0]
    lengths: Any = memoryview(ascending.numpy())  # type: ignore[arg-type]
    sums: Any = memoryview(ascending.cumsum(0).numpy())  # type: ignore[arg-type]
    while (start := cuts[-1]) < count:

        def size(end: int, start: int = start) -> int:
            if packed:
                return sums[end - 1] - (sums[start - 1] if start else 0)
            return (end - start) * lengths[end - 1]

        most = count if max_rows is None else min(start + max_rows, count)
        ends = range(start + 1, most + 1)
        cuts.append(start + bisect_right(ends, frames, key=size))
    return cuts


def _name(index: int, names: Sequence[str] | None) -> str:
    return f"utterance {index}" if names is None else str(names[index])
