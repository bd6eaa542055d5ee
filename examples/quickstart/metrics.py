"""The package's metrics of mels, the mel-cepstral distortion in dB of this example's mels.

Lists of normalised log-mels `(N_i, 80)`, `generated[i]` and `truth[i]` the same utterance, frame by
frame, prompt frames cut off.
"""

import functools

from examples.quickstart.audio import LOG_SCALE
from imf_kernels import metrics
from imf_kernels.metrics import c2st, frechet, sharpness, to_teacher

__all__ = ["c2st", "frechet", "mcd", "sharpness", "to_teacher"]

mcd = functools.partial(metrics.mcd, scale=LOG_SCALE)
