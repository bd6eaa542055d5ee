"""The vocoder that needs no weights."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from imf_kernels import checks
from imf_kernels.data.mels import Mel


class GriffinLim:
    """Magnitudes from mels, phases by iteration (needs `librosa`): rough, and always the same."""

    def __init__(self, mel: Mel, iterations: int = 32) -> None:
        import librosa

        checks.positive_int("iterations", iterations)
        self.mel, self.iterations = mel, iterations
        vocos = mel.lineage == "vocos"
        filters = librosa.filters.mel(
            sr=mel.rate,
            n_fft=mel.n_fft,
            n_mels=mel.channels,
            fmax=mel.fmax,
            htk=vocos,
            norm=None if vocos else "slaney",
        )
        self._bins = torch.linalg.pinv(torch.from_numpy(filters))

    def __call__(self, mel: Tensor) -> Any:
        """A log-mel `(C, n)` to samples, a float32 array."""
        import librosa

        checks.shape("mel", mel, self.mel.channels, "n")
        sizes = (self._bins @ mel.float().cpu().exp()).clamp(min=0)
        return librosa.griffinlim(
            sizes.numpy(),
            n_iter=self.iterations,
            hop_length=self.mel.hop,
            n_fft=self.mel.n_fft,
            **seeded(0),
        )


def seeded(seed: int) -> dict[str, Any]:
    """The seed of librosa's `griffinlim`, by the name that it has there: `rng` from 1.0 on."""
    import librosa

    known = inspect.signature(librosa.griffinlim).parameters
    return {"rng" if "rng" in known else "random_state": seed}
