"""Velocity models, prepared once, evaluated many times: a DiT of three families, and a U-Net.

Before CosyVoice's, the encoders of their tokens. Around all, the clients' checkpoints.
"""

from imf_kernels.models.baked import Baked
from imf_kernels.models.clients import (
    load_cosyvoice2,
    load_cosyvoice3,
    load_f5,
    load_token_encoder,
)
from imf_kernels.models.conditioning import Conditioning, TensorSpec
from imf_kernels.models.config import CausalUNetConfig, DiTConfig, TextConfig
from imf_kernels.models.cosyvoice2 import CausalUNet
from imf_kernels.models.dit import DiT
from imf_kernels.models.scope import Cache
from imf_kernels.models.step_tables import Modulation, StepTables
from imf_kernels.models.step_tokens import StepTokenDiT
from imf_kernels.models.students import Student, load_student, save_student
from imf_kernels.models.time_embedding import TimeEmbedding, TimeEmbedMixer
from imf_kernels.models.token_encoder import EncoderStream, TokenEncoder

__all__ = [
    "Baked",
    "Cache",
    "CausalUNet",
    "CausalUNetConfig",
    "Conditioning",
    "DiT",
    "DiTConfig",
    "EncoderStream",
    "Modulation",
    "StepTables",
    "StepTokenDiT",
    "Student",
    "TensorSpec",
    "TextConfig",
    "TimeEmbedMixer",
    "TimeEmbedding",
    "TokenEncoder",
    "load_cosyvoice2",
    "load_cosyvoice3",
    "load_f5",
    "load_student",
    "load_token_encoder",
    "save_student",
]
