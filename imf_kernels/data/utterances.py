"""What a dataset is: utterances by number, whose lengths are known before they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from imf_kernels import checks


@dataclass(frozen=True)
class Utterance:
    """One utterance, on the CPU.

    Attributes:
        name: For reports: a path, an id.
        mel: Normalised as the model has it, float32 `(n, C)`, n >= 1.
        features: What the collate makes conditions of: "text" ids `(L,)`; "tokens" `(m,)` and
            "speaker" `(S,)`; or your own.
    """

    name: str
    mel: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.shape(f"mel of {self.name}", self.mel, "n", "C")
        checks.floating(f"mel of {self.name}", self.mel)
        if not len(self.mel):
            raise ValueError(f"mel of {self.name}: expected one frame or more, got none")


class Utterances(Protocol):
    """A dataset. For a loader with workers it can be pickled, and is the same in every process.

    What cannot be read is an error that names it, never another utterance.
    """

    @property
    def frames(self) -> Sequence[int] | Tensor:
        """Mel frames of each, no fewer than `self[i].mel` has, known without reading audio.

        An integer tensor `(len,)` on the CPU, or any sequence.
        """
        ...

    @property
    def names(self) -> Sequence[str]:
        """The utterances' names, known without reading audio; looked up when asked, if many."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Utterance: ...


def within(seconds: Sequence[float] | Tensor, least: float, most: float) -> tuple[Tensor, int]:
    """Which lengths are in `[least, most]`, ascending int32, and how many are not.

    Raises:
        ValueError: all are outside, or the bounds are none.
    """
    checks.number("min_seconds", least, 0)
    checks.number("max_seconds", most, least)
    lengths = torch.as_tensor(seconds, dtype=torch.float64)
    kept = ((lengths >= least) & (lengths <= most)).nonzero().flatten().int()
    if not len(kept):
        raise ValueError(
            f"min_seconds, max_seconds: expected utterances in [{least}, {most}], got none of "
            f"{len(seconds)}"
        )
    return kept, len(seconds) - len(kept)


def located(written: str, folder: Path) -> Path:
    """A file as it is written, or if there is none seen from the folder."""
    path = Path(written)
    return path if path.is_absolute() or path.is_file() else folder / path


def fitted(name: str, mel: Tensor, frames: int) -> Tensor:
    """A mel as long as its dataset said, or a little shorter.

    Durations that others wrote down are off by a frame or two: what is more is cut off.

    Raises:
        ValueError: off by more than 2 %, and 4 frames: audio that broke off, or is not the one.
    """
    if abs(len(mel) - frames) > max(4, frames // 50):
        raise ValueError(f"{name}: expected {frames} mel frames, got {len(mel)}")
    return mel[:frames]
