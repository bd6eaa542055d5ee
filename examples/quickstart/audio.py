"""Waveform to normalised log-mel and, approximately, back.

Mels are `(N, MELS)` float32, natural logarithm of the Slaney mel magnitude, floored, then
shifted and scaled by fixed constants to about zero mean and unit variance. Frame `n` is centred
on sample `n * HOP`.
"""

import functools
from pathlib import Path

import librosa
import numpy as np
import soundfile
import torch
from torch import Tensor

from imf_kernels.distill.griffin_lim import seeded
from imf_kernels.files import replacing

SAMPLE_RATE = 22050
HOP = 441  # 50 frames per second
N_FFT = 1024
MELS = 80

# Measured on the quickstart corpus (see corpus.py) and fixed: changing one invalidates every
# model trained on these mels.
LOG_FLOOR = -9.0
LOG_MEAN = -4.9
LOG_SCALE = 2.1


@functools.cache
def _filterbank() -> np.ndarray:
    return librosa.filters.mel(sr=SAMPLE_RATE, n_fft=N_FFT, n_mels=MELS)


@functools.cache
def _inverse_filterbank() -> np.ndarray:
    """The least-norm inverse; non-negative least squares is no closer here and far slower."""
    return np.linalg.pinv(_filterbank())


def log_mel(audio: np.ndarray) -> Tensor:
    """Analyse `(samples,)` float32 audio at `SAMPLE_RATE` into `(1 + samples // HOP, MELS)`."""
    magnitude = np.abs(librosa.stft(audio, n_fft=N_FFT, hop_length=HOP, center=True))
    log = np.log(np.maximum(_filterbank() @ magnitude, np.exp(LOG_FLOOR))).T
    return torch.from_numpy(np.ascontiguousarray((log - LOG_MEAN) / LOG_SCALE, dtype=np.float32))


def natural_log_mel(mel: Tensor) -> Tensor:
    """Undo the normalisation: natural logarithm of the mel magnitude, same shape."""
    return mel * LOG_SCALE + LOG_MEAN


def griffin_lim(mel: Tensor, iterations: int = 32, seed: int = 0) -> np.ndarray:
    """Estimate the waveform of a normalised log-mel.

    Args:
        mel: `(N, MELS)` float, normalised.
        iterations: Griffin-Lim rounds.
        seed: Of the initial phase.

    Returns:
        `((N - 1) * HOP,)` float32; a phase-less estimate, audibly metallic.
    """
    # No speech reaches e^8; a diverged model must not turn into infinities here.
    amplitude = natural_log_mel(mel.detach().float().cpu()).clamp(max=8.0).exp().numpy().T
    magnitude = np.maximum(_inverse_filterbank() @ amplitude, 0.0)
    audio = librosa.griffinlim(magnitude, n_iter=iterations, hop_length=HOP, **seeded(seed))
    return audio.astype(np.float32)


def write_wav(path: Path, audio: np.ndarray) -> None:
    """Write `(samples,)` audio as 16-bit WAV, atomically, scaled down if its peak exceeds 1."""
    peak = float(np.abs(audio).max(initial=0.0))
    with replacing(Path(path)) as temporary:
        soundfile.write(
            temporary, audio / max(peak, 1.0), SAMPLE_RATE, format="WAV", subtype="PCM_16"
        )
