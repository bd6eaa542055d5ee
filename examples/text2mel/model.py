"""The teacher: F5-TTS's shape in small, the library's DiT with its text tower."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from examples.quickstart.audio import MELS
from examples.quickstart.model import Token2Mel
from imf_kernels.files import replacing
from imf_kernels.models import DiT, DiTConfig, TextConfig

TEACHER = Path(__file__).with_name("teacher.safetensors")


def teacher_config(symbols: Sequence[str]) -> DiTConfig:
    """2.7 M parameters, of which the estimator's are as wide as the quickstart's."""
    text = TextConfig(vocab=len(symbols), dim=128, layers=4)
    return DiTConfig.for_variant("f5_v1", text=text, dim=192, depth=4, heads=3, channels=MELS)


@torch.no_grad()
def untrained(aligned: Token2Mel) -> DiT:
    """A model to train, with the weights of the quickstart's where it has a place for them.

    `aligned` has learned mels from phonemes under their frames. All its blocks but the middle one
    stay; its phoneme embedding becomes the first columns of the text tower's, whose blocks add
    nothing yet, and its `prompt | mu` columns those of `prompt | text`. Speakers are left to the
    prompt.
    """
    model = DiT(teacher_config(aligned.symbols))
    blocks: Any = aligned.estimator.transformer_blocks
    kept = [block for i, block in enumerate(blocks) if i != len(blocks) // 2]
    for own, given in zip(model.transformer_blocks, kept, strict=True):
        own.load_state_dict(given.state_dict())
    for name in ("time_embed", "input_embed.conv_pos_embed", "norm_out", "proj_out"):
        given = aligned.estimator.get_submodule(name)
        model.get_submodule(name).load_state_dict(given.state_dict())
    joint, theirs = model.input_embed.proj, aligned.estimator.input_embed.proj
    joint.weight.zero_()
    joint.weight[:, : 3 * MELS] = theirs.weight[:, : 3 * MELS]
    joint.bias.copy_(theirs.bias)
    tower: Any = model.text_embed
    tower.text_embed.weight[0] = 0.0
    tower.text_embed.weight[1:, :MELS] = aligned.encoder.phonemes.weight
    for block in tower.text_blocks:
        nn.init.zeros_(block.pwconv2.weight)
        nn.init.zeros_(block.pwconv2.bias)
    return model


def save_teacher(model: DiT, symbols: Sequence[str], path: Path) -> None:
    """Weights in float16, the table of symbols in the metadata; written atomically."""
    tensors = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"symbols": json.dumps(list(symbols))})


def load_teacher(path: Path = TEACHER) -> tuple[DiT, tuple[str, ...]]:
    """The teacher in float32, in eval mode, and its symbols."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        symbols = tuple(json.loads(file.metadata()["symbols"]))
    model = DiT(teacher_config(symbols))
    model.load_state_dict(tensors)
    return model.eval(), symbols
