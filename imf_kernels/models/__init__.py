"""Velocity models: one DiT for three public families, prepared once and evaluated many times."""

from imf_kernels.models.baked import Baked
from imf_kernels.models.conditioning import Conditioning, TensorSpec
from imf_kernels.models.config import DiTConfig, TextConfig
from imf_kernels.models.dit import DiT
from imf_kernels.models.step_tables import Modulation, StepTables
from imf_kernels.models.time_embedding import TimeEmbedding, TimeEmbedMixer

__all__ = [
    "Baked",
    "Conditioning",
    "DiT",
    "DiTConfig",
    "Modulation",
    "StepTables",
    "TensorSpec",
    "TextConfig",
    "TimeEmbedMixer",
    "TimeEmbedding",
]
