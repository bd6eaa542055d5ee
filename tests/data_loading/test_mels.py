"""Mel spectrograms, against their definitions written out, and F5-TTS's own."""

import math

import numpy as np
import pytest
import torch

from benchmarks import f5_client
from imf_kernels.data import mels
from tests.data_loading import sounds


def mel_scale(hertz, slaney):
    if not slaney:
        return 2595 * math.log10(1 + hertz / 700)
    if hertz < 1000:
        return hertz * 3 / 200
    return 15 + math.log(hertz / 1000) * 27 / math.log(6.4)


def hertz(value, slaney):
    if not slaney:
        return 700 * (10 ** (value / 2595) - 1)
    if value < 15:
        return value * 200 / 3
    return 1000 * math.exp((value - 15) * math.log(6.4) / 27)


def written_out(wave, kind):
    """In float64: each frame's discrete Fourier transform, each triangle."""
    vocos = kind.lineage == "vocos"
    n, hop = kind.n_fft, kind.hop
    mirrored = n // 2 if vocos else (n - hop) // 2
    wave = np.pad(wave.astype(np.float64), mirrored, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n)
    starts = range(0, len(wave) - n + 1, hop)
    bins = np.stack([np.fft.rfft(window * wave[start : start + n]) for start in starts])
    sizes = np.abs(bins) if vocos else np.sqrt(np.abs(bins) ** 2 + 1e-9)
    top = kind.fmax or kind.rate / 2
    scale = np.linspace(0, mel_scale(top, not vocos), kind.channels + 2)
    edges = [hertz(value, not vocos) for value in scale]
    at = np.arange(n // 2 + 1) * kind.rate / n
    out = np.zeros((len(bins), kind.channels))
    for channel in range(kind.channels):
        low, middle, high = edges[channel : channel + 3]
        rising, falling = (at - low) / (middle - low), (high - at) / (high - middle)
        weight = np.maximum(0, np.minimum(rising, falling))
        if not vocos:
            weight = weight * 2 / (high - low)
        out[:, channel] = sizes @ weight
    return np.log(np.maximum(out, 1e-5))


def noisy(samples):
    generator = np.random.default_rng(0)
    tone = sounds.wave(samples)[:, 0]
    return (tone + 0.1 * generator.standard_normal(samples)).astype(np.float32)


@pytest.mark.parametrize("samples", [2000, 4321])
@pytest.mark.parametrize("name", mels.NAMED)
def test_definition(name, samples):
    kind, wave = mels.NAMED[name], noisy(samples)
    got = kind(torch.from_numpy(wave))
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    assert got.shape == (kind.frames(samples), kind.channels)
    np.testing.assert_allclose(got.numpy(), written_out(wave, kind), atol=2e-4)


@pytest.mark.parametrize("name", mels.NAMED)
def test_frames_of_any_length(name):
    kind = mels.NAMED[name]
    borders = (kind.padding, kind.padding + 1, 4 * kind.hop - 1, 4 * kind.hop, 4 * kind.hop + 1)
    for samples in borders:
        frames = kind.frames(samples)
        if frames:
            assert len(kind(torch.zeros(samples))) == frames
        else:
            with pytest.raises(ValueError, match=f"wave: expected more than .* got {samples}"):
                kind(torch.zeros(samples))


def test_silence_is_the_floor():
    assert torch.equal(mels.NAMED["vocos"](torch.zeros(1024)), torch.full((5, 100), math.log(1e-5)))


def test_as_f5_tts_has_it():
    try:
        f5_client.load()
    except ImportError as error:
        pytest.skip(f"needs f5-tts: {error}")
    from f5_tts.model.modules import get_bigvgan_mel_spectrogram

    wave = torch.from_numpy(noisy(5000))
    want = get_bigvgan_mel_spectrogram(wave[None])[0].mT
    torch.testing.assert_close(mels.NAMED["bigvgan"](wave), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mels.of("mfcc"), "mel: expected one of vocos, bigvgan, .* got 'mfcc'"),
        (lambda: mels.Mel("vocoder", 8, 2, 3), "lineage: expected one of vocos, hifigan"),
        (lambda: mels.Mel("vocos", 8, 0, 3), "hop: expected an integer >= 1, got 0"),
        (lambda: mels.of("vocos")(torch.zeros(1, 9)), r"wave: expected shape \(samples,\)"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
