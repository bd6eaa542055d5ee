"""The clients' mel spectrograms: natural logarithms of magnitudes of 1e-5 or more.

Two lineages. "vocos" centres frames on multiples of the hop and sums HTK triangles; "hifigan"
(BigVGAN, Matcha) centres windows on hops and sums Slaney's triangles of equal area.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from imf_kernels import checks


@dataclass(frozen=True)
class Mel:
    """`mel(wave)`, float32 `(samples,)` at `rate` to `(frames, channels)`.

    Attributes:
        lineage: "vocos" or "hifigan".
        rate: Samples per second.
        n_fft: Samples of a window, Hann's.
        hop: Samples from frame to frame.
        fmax: Highest frequency in Hz; None: half the rate.
    """

    lineage: str
    n_fft: int
    hop: int
    channels: int
    fmax: float | None = None
    rate: int = 24000

    def __post_init__(self) -> None:
        checks.choice("lineage", self.lineage, ("vocos", "hifigan"))
        for name in ("n_fft", "hop", "channels", "rate"):
            checks.positive_int(name, getattr(self, name))

    @property
    def padding(self) -> int:
        """Samples that are mirrored at either end."""
        return (self.n_fft if self.lineage == "vocos" else self.n_fft - self.hop) // 2

    def frames(self, samples: int) -> int:
        """Frames of so many samples; 0 of those that are too few."""
        return int(self.frames_of(torch.tensor(samples)))

    def frames_of(self, samples: Tensor) -> Tensor:
        """Frames of so many samples each, int32."""
        frames = (samples + 2 * self.padding - self.n_fft) // self.hop + 1
        return frames.clamp(min=0).masked_fill(samples <= self.padding, 0).int()

    def __call__(self, wave: Tensor) -> Tensor:
        """On the wave's device.

        Raises:
            ValueError, TypeError: naming the argument, the expected and the given value.
        """
        checks.shape("wave", wave, "samples")
        checks.dtype("wave", wave, torch.float32)
        if not self.frames(len(wave)):
            raise ValueError(f"wave: expected more than {self.padding} samples, got {len(wave)}")
        wave = F.pad(wave[None], (self.padding, self.padding), mode="reflect")[0]
        window = torch.hann_window(self.n_fft, device=wave.device)
        bins = torch.stft(
            wave, self.n_fft, self.hop, window=window, center=False, return_complex=True
        )
        if self.lineage == "vocos":
            sizes = bins.abs()
        else:
            sizes = (torch.view_as_real(bins).square().sum(-1) + 1e-9).sqrt()
        mel = _filters(self).to(wave.device) @ sizes
        return mel.clamp(min=1e-5).log().mT.contiguous()


@cache
def _filters(mel: Mel) -> Tensor:
    """Float32 `(channels, n_fft // 2 + 1)`."""
    import librosa

    vocos = mel.lineage == "vocos"
    return torch.from_numpy(
        librosa.filters.mel(
            sr=mel.rate,
            n_fft=mel.n_fft,
            n_mels=mel.channels,
            fmax=mel.fmax,
            htk=vocos,
            norm=None if vocos else "slaney",
        )
    )


NAMED = {
    "vocos": Mel("vocos", n_fft=1024, hop=256, channels=100),
    "bigvgan": Mel("hifigan", n_fft=1024, hop=256, channels=100),
    "cosyvoice2": Mel("hifigan", n_fft=1920, hop=480, channels=80, fmax=8000),
    "cosyvoice3": Mel("hifigan", n_fft=1920, hop=480, channels=80),
}
"""F5-TTS's two kinds; CosyVoice2's, and CosyVoice3's, which reaches up to 12 kHz."""


def of(mel: Mel | str) -> Mel:
    """A mel by its name, or itself."""
    if isinstance(mel, str):
        checks.choice("mel", mel, tuple(NAMED))
        return NAMED[mel]
    return mel
