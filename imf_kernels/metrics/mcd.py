"""Mel-cepstral distortion, frame by frame or with time warping."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from imf_kernels import checks
from imf_kernels.metrics import mels

CEPSTRA = 13
DECIBELS = 10 / math.log(10)


def mcd(generated: Sequence[Tensor], truth: Sequence[Tensor], *, scale: float = 1.0) -> float:
    """Mel-cepstral distortion in dB, frames aligned as they are (no time warping); 0 is best.

    `10 / ln 10 * sqrt(2 * sum_m (c_m - c'_m)^2)`, averaged over all frames, where the natural
    log-mel is `sum_m c_m cos(pi m (k + 1/2) / C)` and m = 1 to 13: the root mean square over
    the mel axis of the difference between the two smoothed spectra, loudness (m = 0) left out.

    Args:
        generated: Log-mels `(N_i, C)`.
        truth: Their true counterparts, of the same shapes.
        scale: What one unit of these mels is in natural logarithms: 1 for F5-TTS and CosyVoice,
            ln 10 for decadic ones, the standard deviation for normalised ones (their mean cancels).
    """
    mels.check(generated, truth)
    difference = _cepstra(mels.frames(generated) - mels.frames(truth), scale)
    return DECIBELS * (2 * difference.square().sum(dim=1)).sqrt().mean().item()


def mcd_dtw(generated: Sequence[Tensor], truth: Sequence[Tensor], *, scale: float = 1.0) -> float:
    """`mcd` of mels of different lengths, each pair aligned by dynamic time warping (`librosa`).

    A pair's path is the one of least total distortion; the mean is over a path's steps, then over
    the pairs. Arguments are those of `mcd`, but a pair may differ in N.
    """
    mels.check(generated, truth, warped=True)
    from librosa.sequence import dtw

    values = []
    for one, other in zip(generated, truth, strict=True):
        ours, theirs = (_cepstra(mels.frames([mel]), scale) for mel in (one, other))
        distances = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist")
        total, path = dtw(C=distances.numpy())
        values.append(DECIBELS * math.sqrt(2) * float(total[-1, -1]) / len(path))
    return sum(values) / len(values)


def _cepstra(frames: Tensor, scale: float) -> Tensor:
    """Coefficients 1 to 13 of natural log-mels, `(N, 13)` float64: a DCT-II."""
    checks.number("scale", scale)
    channels = frames.shape[1]
    m = torch.arange(1, CEPSTRA + 1, dtype=torch.float64)
    k = torch.arange(channels, dtype=torch.float64)
    basis = 2 / channels * torch.cos(math.pi / channels * (k[:, None] + 0.5) * m)
    return scale * frames @ basis
