"""Two lists of mels, `generated[i]` and `truth[i]` of one utterance: checked, pooled, cut up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PATCH_FRAMES = 3


def check(generated: Sequence[Tensor], truth: Sequence[Tensor], *, warped: bool = False) -> None:
    """Both must hold as many mels `(N_i >= 3, C)`, at least one.

    Args:
        warped: A pair may differ in N.
    """
    if not generated or len(generated) != len(truth):
        raise ValueError(
            f"generated: expected as many mels as true ones, at least one, "
            f"got {len(generated)} and {len(truth)}"
        )
    for index, pair in enumerate(zip(generated, truth, strict=True)):
        one, other = (mel.shape[1:] if warped else mel.shape for mel in pair)
        if one != other or any(mel.ndim != 2 or len(mel) < PATCH_FRAMES for mel in pair):
            raise ValueError(
                f"generated: expected mels (N >= {PATCH_FRAMES}, C) of the true ones' "
                f"{'C' if warped else 'shape'}, got {tuple(pair[0].shape)} and "
                f"{tuple(pair[1].shape)} at index {index}"
            )


def frames(mels: Sequence[Tensor]) -> Tensor:
    """All frames of all mels, `(sum N_i, C)` float64."""
    return torch.cat([mel.detach().cpu().double() for mel in mels])


def patches(mels: Sequence[Tensor]) -> list[Tensor]:
    """Every run of 3 frames of each mel, flattened: `(N_i - 2, 3 C)` float32 each."""
    return [
        mel.detach().cpu().float().unfold(0, PATCH_FRAMES, 1).flatten(start_dim=1) for mel in mels
    ]
