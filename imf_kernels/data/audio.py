"""Audio files as waves of one rate, one channel."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor


def header(path: Path) -> tuple[int, int]:
    """A file's samples, and their rate.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    import soundfile

    _expect(path)
    try:
        found = soundfile.info(path)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path}: expected audio that libsndfile reads: {error}") from error
    return found.frames, found.samplerate


def resampled(samples: Tensor, given: Tensor, rate: int) -> Tensor:
    """How many `read` returns of files of so many samples at rates `given`; integers."""
    return (2 * samples * rate + given) // (2 * given)


def read(name: str, source: Path | bytes, rate: int) -> Tensor:
    """Float32 `(samples,)`, the mean of the channels, resampled where it has another rate.

    Args:
        name: For errors.
        source: A file, or what one holds.

    Raises:
        FileNotFoundError, ValueError: starting with `name`.
    """
    import soundfile
    import soxr

    if isinstance(source, Path):
        _expect(source)
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        channels, given = soundfile.read(file, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{name}: expected audio that libsndfile reads: {error}") from error
    wave = channels.mean(axis=1)
    if given != rate:
        wave = soxr.resample(wave, given, rate)
    made = torch.from_numpy(wave)
    if not bool(made.isfinite().all()):
        raise ValueError(f"{name}: expected finite samples, got NaN or infinity")
    return made


def _expect(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected an audio file, got none there")
