"""Velocity models: one DiT for three public families, prepared once and evaluated many times."""

from imf_kernels.models.conditioning import Conditioning, TensorSpec
from imf_kernels.models.config import DiTConfig, TextConfig
from imf_kernels.models.dit import DiT

__all__ = ["Conditioning", "DiT", "DiTConfig", "TensorSpec", "TextConfig"]
