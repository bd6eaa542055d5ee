"""Data for distillation: utterances, frame-budget batches of them, and what a model is given."""

from imf_kernels.data.audio_folder import AudioFolder
from imf_kernels.data.budget import Budget
from imf_kernels.data.collate import Continuation, Infilling
from imf_kernels.data.cosyvoice_parquet import CosyVoiceParquet, regroup
from imf_kernels.data.encoded import Encoded
from imf_kernels.data.f5_prepared import F5Prepared
from imf_kernels.data.loader import Loader
from imf_kernels.data.mels import Mel
from imf_kernels.data.utterances import Utterance, Utterances

__all__ = [
    "AudioFolder",
    "Budget",
    "Continuation",
    "CosyVoiceParquet",
    "Encoded",
    "F5Prepared",
    "Infilling",
    "Loader",
    "Mel",
    "Utterance",
    "Utterances",
    "regroup",
]
