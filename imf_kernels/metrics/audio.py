"""Audio files as mono tensors at one rate (`soundfile`, `soxr`), and their log-mels (`librosa`)."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from imf_kernels import checks

RATE = 16000
"""Hz, of every network here."""
SHORTEST = RATE // 20
"""Samples that most networks need."""


def read_audio(path: str | os.PathLike[str], rate: int = RATE) -> Tensor:
    """A file's channels averaged and resampled: `(samples,)` float32 in about [-1, 1].

    Args:
        path: Whatever `soundfile` reads (WAV, FLAC, OGG, MP3).
        rate: Hz of the result.

    Raises:
        ValueError: no audio; the error names the file.
        FileNotFoundError: no such file.
    """
    import soundfile
    import soxr

    checks.positive_int("rate", rate)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"path: expected an audio file, got no file: {os.fspath(path)}")
    try:
        samples, own = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"path: expected an audio file, got {os.fspath(path)}: {error}") from error
    mono = samples.mean(axis=1)
    return torch.from_numpy(mono if own == rate else soxr.resample(mono, own, rate))


def check(name: str, audio: Tensor, shortest: int = SHORTEST) -> None:
    """A clip as `read_audio` gives it, long enough for a network."""
    checks.shape(name, audio, "samples")
    checks.dtype(name, audio, torch.float32)
    if len(audio) < shortest:
        raise ValueError(f"{name}: expected at least {shortest} samples, got {len(audio)}")


def log_mel(audio: Tensor, rate: int) -> Tensor:
    """The natural log-mel of a clip, 80 Slaney channels and 100 frames per second: `(N, 80)`.

    For distortions between recordings, not for a model: every model has a log-mel of its own.

    Args:
        audio: `(samples,)` float32.
        rate: Its samples per second.
    """
    from librosa.filters import mel

    checks.shape("audio", audio, "samples")
    checks.positive_int("rate", rate)
    window, n_fft = rate // 20, 1 << (rate // 20).bit_length()
    spectrum = torch.stft(
        audio.cpu().float(), n_fft, rate // 100, window, torch.hann_window(window),
        pad_mode="constant", return_complex=True,
    )  # fmt: skip
    banks = torch.from_numpy(mel(sr=rate, n_fft=n_fft, n_mels=80))
    return (banks @ spectrum.abs()).T.clamp(min=1e-5).log()
