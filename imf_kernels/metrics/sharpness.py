"""How much detail mels have along the mel axis."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from imf_kernels.metrics import mels


def sharpness(generated: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Mel-axis detail relative to the truth; 1 is equal, below is blur, above is noise.

    The mean magnitude of the second difference along the mel axis (harmonics and formant edges,
    not spectral slope), generated over truth.

    Args:
        generated: Mels `(N_i, C)`.
        truth: Of the same shapes.
    """
    mels.check(generated, truth)
    detail_g, detail_t = (
        mels.frames(side).diff(n=2, dim=1).abs().mean().item() for side in (generated, truth)
    )
    return detail_g / detail_t
