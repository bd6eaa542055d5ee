"""The metrics of mels: closed forms, and that they know truth, blur and noise on made mels."""

import math

import pytest
import torch

from imf_kernels.metrics import c2st, frechet, log_mel, mcd, mcd_dtw, sharpness, to_teacher

CHANNELS = 40


@pytest.fixture(scope="module")
def truth():
    """Voices of moving formants and harmonics, normalised."""
    generator = torch.Generator().manual_seed(0)
    mels = []
    for frames in (90, 120, 100, 110):
        walk = torch.randn(frames, 4, generator=generator).cumsum(0) / 8
        k = torch.arange(CHANNELS)
        formants = sum(
            torch.exp(-((k - 8 * (i + 1) - 3 * walk[:, i : i + 1].sin()) ** 2) / 12)
            for i in range(4)
        )
        harmonics = 0.5 * torch.cos(2.2 * k + 3 * walk[:, :1])
        noise = 0.2 * torch.randn(frames, CHANNELS, generator=generator)
        mels.append(formants + harmonics + noise)
    pooled = torch.cat(mels)
    return [(mel - pooled.mean()) / pooled.std() for mel in mels]


def test_they_know_truth_blur_and_noise(truth):
    blurred = [torch.nn.functional.avg_pool1d(m[:, None], 5, 1, 2)[:, 0] for m in truth]
    noise = [torch.randn_like(m) for m in truth]
    assert mcd(truth, truth) == 0
    assert frechet(truth, truth) == pytest.approx(0, abs=1e-6)
    assert sharpness(truth, truth) == pytest.approx(1)
    assert to_teacher(truth, truth) == 0
    assert c2st(truth, truth) == pytest.approx(0.5, abs=0.02)
    assert sharpness(blurred, truth) < 0.5
    assert c2st(blurred, truth) > 0.8
    assert 1 < frechet(blurred, truth) < frechet(noise, truth)
    assert mcd(blurred, truth) < mcd(noise, truth)
    assert c2st(noise, truth, seed=3) == c2st(noise, truth, seed=3)


def test_mcd_of_one_cosine(truth):
    """A cosine of m periods and amplitude a lies a sqrt(2) 10 / ln 10 away; loudness does not."""
    k = torch.arange(CHANNELS) + 0.5
    for m, a in ((1, 0.3), (13, 0.1)):
        moved = [mel + a * torch.cos(math.pi * m * k / CHANNELS) + 0.7 for mel in truth]
        expected = a * math.sqrt(2) * 10 / math.log(10)
        assert mcd(moved, truth) == pytest.approx(expected, rel=1e-5)
        assert mcd(moved, truth, scale=2.1) == pytest.approx(2.1 * expected, rel=1e-5)
    beyond = [mel + torch.cos(math.pi * 14 * k / CHANNELS) for mel in truth]
    assert mcd(beyond, truth) == pytest.approx(0, abs=1e-5), "the 14th is left out"


def test_mcd_is_a_mean_over_frames_and_dtw_over_pairs(truth):
    k = torch.arange(CHANNELS) + 0.5
    moved = [truth[0] + torch.cos(math.pi * k / CHANNELS), *truth[1:]]
    one = math.sqrt(2) * 10 / math.log(10)
    frames = [len(mel) for mel in truth]
    assert mcd(moved, truth) == pytest.approx(one * frames[0] / sum(frames), rel=1e-4)


def test_warping_finds_what_was_stretched(truth):
    pytest.importorskip("librosa", reason="needs the [eval] extra")
    slower = [mel.repeat_interleave(2, dim=0) for mel in truth]
    assert mcd_dtw(slower, truth) == pytest.approx(0, abs=1e-9)
    assert mcd_dtw(truth, slower) == pytest.approx(0, abs=1e-9)
    noisy = [mel + 0.3 * torch.randn_like(mel) for mel in truth]
    assert 0 < mcd_dtw(noisy, truth) <= mcd(noisy, truth) * 1.2
    assert mcd_dtw(noisy, truth, scale=2) == pytest.approx(2 * mcd_dtw(noisy, truth))
    assert mcd_dtw(truth[:1], truth[1:2]) > 0


def test_frechet_of_gaussians():
    """Frames of independent channels with standard deviations s and s' and means m and m'."""
    torch.manual_seed(0)
    s, other = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([1.0, 1.0, 1.5])
    generated = [torch.randn(40000, 3) * s + 0.4]
    reference = [torch.randn(40000, 3) * other]
    expected = 3 * (3 * 0.4**2 + float((s - other).square().sum()))
    assert frechet(generated, reference) == pytest.approx(expected, rel=0.05)


def test_distances(truth):
    offset = [mel + 0.5 for mel in truth]
    assert to_teacher(offset, truth) == pytest.approx(0.5)
    assert sharpness([2 * mel for mel in truth], truth) == pytest.approx(2)


def test_errors_name_what_is_wrong(truth):
    for metric in (mcd, mcd_dtw, frechet, sharpness, c2st, to_teacher):
        with pytest.raises(ValueError, match="at least one, got 3 and 4"):
            metric(truth[:3], truth)
        with pytest.raises(ValueError, match=r"got \(2, 40\) and \(2, 40\) at index 0"):
            metric([torch.zeros(2, 40)], [torch.zeros(2, 40)])
        with pytest.raises(ValueError, match="at index 1"):
            metric(truth[:2], [truth[0], truth[1][:, :39]])
    with pytest.raises(ValueError, match="at index 0"):
        mcd(truth[:1], [truth[0][:-1]])
    with pytest.raises(ValueError, match="at least 2 mels"):
        c2st(truth[:1], truth[:1])
    with pytest.raises(ValueError, match="scale: expected a finite number"):
        mcd(truth, truth, scale=math.nan)


def test_log_mel_of_a_tone_peaks_at_its_channel():
    librosa = pytest.importorskip("librosa", reason="needs the [eval] extra")
    rate = 16000
    tone = 0.5 * torch.sin(2 * math.pi * 1000 * torch.arange(rate) / rate)
    mel = log_mel(tone, rate)
    assert mel.shape == (101, 80)
    centres = librosa.mel_frequencies(82, fmin=0, fmax=rate / 2)[1:-1]
    assert abs(centres[int(mel[50].argmax())] - 1000) < 60
    assert float(mel.min()) >= math.log(1e-5) - 1e-6
    torch.testing.assert_close(
        log_mel(2 * tone, rate)[50].max() - mel[50].max(), torch.tensor(math.log(2))
    )
