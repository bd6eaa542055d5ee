"""Buckets: the fixed shapes that graphs are captured for, and the choice among them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from imf_kernels import checks


class Bucket(NamedTuple):
    """Up to `rows` rows, each padded to `frames` frames."""

    rows: int
    frames: int

    @property
    def size(self) -> int:
        """Frames computed, whatever is in them."""
        return self.rows * self.frames

    def holds(self, lengths: Sequence[int], total: int) -> bool:
        return len(lengths) <= self.rows and max(lengths, default=0) <= self.frames


class PackedBucket(NamedTuple):
    """Up to `rows` rows behind one another, `total` frames in all, none longer than `frames`."""

    rows: int
    total: int
    frames: int

    @property
    def size(self) -> int:
        return self.total

    def holds(self, lengths: Sequence[int], total: int) -> bool:
        return Bucket(self.rows, self.frames).holds(lengths, total) and total <= self.total


AnyBucket = TypeVar("AnyBucket", Bucket, PackedBucket)

# Alone, a request of 64 frames or more computes at most 1.5 times its frames.
_ALONE = (96, 128, 192, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 2048, 2560, 3200)
_TOGETHER = (128, 256, 512, 768, 1024, 1280, 1536, 2048, 3200)

DEFAULT: tuple[Bucket, ...] = (
    *(Bucket(1, frames) for frames in _ALONE),
    *(Bucket(rows, frames) for rows in (2, 4, 8) for frames in _TOGETHER),
)
"""Padded rows of up to 34 s (F5-TTS, 93.75 frames a second) or 64 s (CosyVoice, 50)."""

PACKED: tuple[PackedBucket, ...] = tuple(
    PackedBucket(rows, total, frames=min(total, 3200))
    for rows, total in (
        (1, 96),
        (1, 128),
        (1, 256),
        (2, 384),
        (2, 512),
        (2, 768),
        (2, 1024),
        (4, 1280),
        (4, 1536),
        (4, 2048),
        (4, 2560),
        (8, 3200),
        (8, 4096),
        (8, 5120),
        (8, 6144),
        (8, 8192),
        (16, 12288),
        (32, 16384),
        (32, 32768),
    )
)
"""The same for rows packed behind one another, for models that evaluate such."""


def table(buckets: Iterable[tuple[int, ...]]) -> tuple[Bucket, ...] | tuple[PackedBucket, ...]:
    """Checked buckets, each once, the largest first: captures then reuse each other's memory.

    Raises:
        ValueError: no buckets, some of two and some of three numbers, or numbers that are not
            positive.
    """
    made: set[Any] = set()
    for bucket in buckets:
        if len(bucket) not in (2, 3):
            raise ValueError(
                f"buckets: expected (rows, frames) or (rows, total, frames), got {tuple(bucket)}"
            )
        kind = Bucket if len(bucket) == 2 else PackedBucket
        for name, value in zip(kind._fields, bucket, strict=True):
            checks.positive_int(f"buckets' {name}", value)
        made.add(kind(*bucket))
    if len({type(bucket) for bucket in made}) != 1:
        found = sorted(made) or "none"
        raise ValueError(f"buckets: expected padded ones or packed ones, got {found}")
    return tuple(sorted(made, key=lambda bucket: (bucket.size, bucket), reverse=True))


def choose(
    buckets: Iterable[AnyBucket], lengths: Sequence[int], total: int | None = None
) -> AnyBucket | None:
    """The bucket that computes the fewest frames among those that hold rows of these lengths.

    `total` is the sum of their valid frames where that is less than the sum of the lengths.
    """
    total = sum(lengths) if total is None else total
    fitting = (bucket for bucket in buckets if bucket.holds(lengths, total))
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
