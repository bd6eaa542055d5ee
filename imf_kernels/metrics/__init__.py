"""How good speech is, one metric a file; each is a plain callable, for reports and for O3S alike.

Of mels (lists of log-mels): `mcd` and `mcd_dtw`, `frechet`, `sharpness`, `c2st`, `to_teacher`.
Several, because each alone can be fooled: mel-cepstral distortion rewards blur (the mean of all
plausible mels beats any single one), the Frechet distance and the sharpness see blur, the
classifier sees whatever is left, and the distance to the teacher tells how much of the error is the
student's own. They are deterministic, and work on the CPU whatever device the mels are on.

Of audio, by networks that others trained: `sim_o` and `sim_xvector` (speakers), `whisper` and
`WER` (words), `utmos` (naturalness). Each is made from weights on disk (or "hf://owner/repo") and
then called with mono audio at `RATE`, `(samples,)` float32, as `read_audio` gives it.
"""

from imf_kernels.metrics.audio import RATE, log_mel, read_audio
from imf_kernels.metrics.c2st import c2st
from imf_kernels.metrics.frechet import frechet
from imf_kernels.metrics.mcd import mcd, mcd_dtw
from imf_kernels.metrics.sharpness import sharpness
from imf_kernels.metrics.sim_o import sim_o
from imf_kernels.metrics.speakers import Similarity
from imf_kernels.metrics.to_teacher import to_teacher
from imf_kernels.metrics.utmos import utmos
from imf_kernels.metrics.wer import WER
from imf_kernels.metrics.whisper import whisper
from imf_kernels.metrics.xvector import sim_xvector

__all__ = [
    "RATE",
    "WER",
    "Similarity",
    "c2st",
    "frechet",
    "log_mel",
    "mcd",
    "mcd_dtw",
    "read_audio",
    "sharpness",
    "sim_o",
    "sim_xvector",
    "to_teacher",
    "utmos",
    "whisper",
]
