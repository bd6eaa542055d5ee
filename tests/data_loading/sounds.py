"""Audio files to read."""

import io

import numpy as np
import soundfile


def wave(samples, rate=24000, hertz=440.0, channels=1):
    """A tone, float32 `(samples, channels)`, the second channel silent."""
    tone = 0.5 * np.sin(2 * np.pi * hertz * np.arange(samples) / rate)
    return np.stack([tone, *[0 * tone] * (channels - 1)], axis=1).astype(np.float32)


def write(path, samples, rate=24000, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave(samples, rate, **options), rate)
    return path


def encoded(samples, rate=24000):
    """A WAV file's bytes."""
    file = io.BytesIO()
    soundfile.write(file, wave(samples, rate), rate, format="WAV", subtype="FLOAT")
    return file.getvalue()
