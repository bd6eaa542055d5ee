"""The quickstart's token2mel model: CosyVoice's shape in small, on the library's DiT.

A frozen encoder turns phonemes and a speaker into `mu` and `spks`; the DiT, with them and a mel
prompt, is the velocity. Distillation trains the DiT alone.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.quickstart.audio import MELS
from imf_kernels.files import replacing
from imf_kernels.models import Conditioning, DiT, DiTConfig

TEACHER = Path(__file__).with_name("teacher.safetensors")


class Encoder(nn.Module):
    """Phoneme ids `(B, N)` and speaker ids `(B,)` to `mu (B, N, 80)` and `spks (B, 80)`."""

    def __init__(self, symbols: int, speakers: int) -> None:
        super().__init__()
        self.phonemes = nn.Embedding(symbols, MELS)
        self.speakers = nn.Embedding(speakers, MELS)

    def forward(self, phonemes: Tensor, speakers: Tensor) -> dict[str, Tensor]:
        return {"mu": self.phonemes(phonemes), "spks": self.speakers(speakers)}


class Token2Mel(nn.Module):
    """Encoder and velocity DiT; itself a `VelocityModel` for teachers, samplers and objectives."""

    def __init__(self, symbols: Sequence[str], speakers: Sequence[str], config: DiTConfig) -> None:
        super().__init__()
        self.symbols, self.speakers = tuple(symbols), tuple(speakers)
        self.encoder = Encoder(len(symbols), len(speakers))
        self.estimator = DiT(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.estimator.dtype

    def prepare(
        self,
        phonemes: Tensor,
        speakers: Tensor,
        prompt: Tensor,
        lengths: Tensor,
        **options: Any,
    ) -> Conditioning:
        """The options are those of the estimator's `prepare`."""
        features = self.encoder(phonemes, speakers)
        return self.estimator.prepare(prompt, lengths, **features, **options)

    def forward(self, x: Tensor, t: Tensor, r: Tensor, cond: Conditioning) -> Tensor:
        return self.estimator(x, t, r, cond)

    def student(self, **options: Any) -> Token2Mel:
        """A student with the same encoder, frozen, and a trainable copy of the DiT that takes r.

        The options are those of `DiT.student`.
        """
        student = copy.deepcopy(self)
        student.encoder.requires_grad_(False)
        student.estimator = self.estimator.student(**options)
        return student


def teacher_config() -> DiTConfig:
    return DiTConfig(dim=192, depth=5, heads=3, channels=MELS)


def save_teacher(model: Token2Mel, path: Path) -> None:
    """Weights in float16, tables of symbols and speakers in the metadata; written atomically."""
    tensors = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    metadata = {
        "symbols": json.dumps(model.symbols),
        "speakers": json.dumps(model.speakers),
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


def load_teacher(path: Path = TEACHER) -> Token2Mel:
    """The teacher in float32, in eval mode."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        tables = {name: json.loads(file.metadata()[name]) for name in ("symbols", "speakers")}
    model = Token2Mel(tables["symbols"], tables["speakers"], teacher_config())
    model.load_state_dict(tensors)
    return model.eval()
