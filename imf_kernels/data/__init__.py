"""Data for distillation: utterances, frame-budget batches of them, and what a model is given."""

from imf_kernels.data.budget import Budget
from imf_kernels.data.loader import Loader
from imf_kernels.data.utterances import Utterance, Utterances

__all__ = ["Budget", "Loader", "Utterance", "Utterances"]
