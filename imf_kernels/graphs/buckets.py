"""Buckets: the fixed shapes that graphs are captured for, and the choice among them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

from imf_kernels import checks


class Bucket(NamedTuple):
    """Up to `rows` rows, each padded to `frames` frames."""

    rows: int
    frames: int

    @property
    def size(self) -> int:
        """Frames computed, whatever is in them."""
        return self.rows * self.frames

    def holds(self, lengths: Sequence[int]) -> bool:
        return len(lengths) <= self.rows and max(lengths, default=0) <= self.frames


class PackedBucket(NamedTuple):
    """Up to `rows` rows behind one another, `frames` frames in all, none longer than `longest`."""

    rows: int
    frames: int
    longest: int

    @property
    def size(self) -> int:
        return self.frames

    def holds(self, lengths: Sequence[int]) -> bool:
        return (
            len(lengths) <= self.rows
            and sum(lengths) <= self.frames
            and max(lengths, default=0) <= self.longest
        )


AnyBucket = TypeVar("AnyBucket", Bucket, PackedBucket)

# Steps of a quarter to a half octave: at batch 1 a request pays for at most 1.5x its frames.
_FRAMES = (96, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 2048, 3072)

DEFAULT: tuple[Bucket, ...] = (
    *(Bucket(1, frames) for frames in _FRAMES),
    *(Bucket(2, frames) for frames in (128, 256, 512, 1024, 2048)),
    *(Bucket(4, frames) for frames in (128, 256, 512, 1024, 2048)),
    *(Bucket(8, frames) for frames in (128, 256, 512, 1024, 1536, 2048)),
)
"""Padded rows of up to 33 s (F5-TTS, 93.75 frames a second) or 61 s (CosyVoice, 50)."""

PACKED: tuple[PackedBucket, ...] = tuple(
    PackedBucket(rows, frames, longest=min(frames, 3072))
    for rows, frames in (
        (1, 128),
        (1, 256),
        (2, 512),
        (4, 1024),
        (4, 2048),
        (8, 4096),
        (16, 8192),
        (32, 16384),
    )
)
"""The same for rows packed behind one another."""


def table(buckets: Iterable[tuple[int, int]]) -> tuple[Bucket, ...]:
    """Checked buckets, each once, the largest first: captures then reuse each other's memory.

    Raises:
        ValueError: no buckets, or rows or frames that are not positive.
    """
    made = {Bucket(*bucket) for bucket in buckets}
    if not made:
        raise ValueError("buckets: expected at least one (rows, frames), got none")
    for bucket in made:
        checks.positive_int("buckets' rows", bucket.rows)
        checks.positive_int("buckets' frames", bucket.frames)
    return tuple(sorted(made, key=lambda bucket: (bucket.size, bucket), reverse=True))


def choose(buckets: Iterable[AnyBucket], lengths: Sequence[int]) -> AnyBucket | None:
    """The bucket that computes the fewest frames among those that hold rows of these lengths."""
    fitting = (bucket for bucket in buckets if bucket.holds(lengths))
    return min(fitting, key=lambda bucket: (bucket.size, bucket), default=None)


def waste(buckets: Iterable[AnyBucket], batches: Iterable[Sequence[int]]) -> tuple[float, float]:
    """Share of computed frames that are padding, and share of batches that no bucket holds."""
    buckets = tuple(buckets)
    computed = valid = missed = count = 0
    for lengths in batches:
        count += 1
        bucket = choose(buckets, lengths)
        if bucket is None:
            missed += 1
        else:
            computed += bucket.size
            valid += sum(lengths)
    return 1 - valid / max(computed, 1), missed / max(count, 1)
