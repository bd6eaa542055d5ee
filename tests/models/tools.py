"""Small models with the golden files' weight recipe, and what the golden files hold."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from imf_kernels.models import CausalUNet, DiT, DiTConfig, TextConfig

DATA = Path(__file__).parents[1] / "data"
VARIANTS = ("f5_v0", "f5_v1", "cosyvoice3")


def recipe(shapes: Mapping[str, list[int]], seed: int) -> dict[str, Tensor]:
    """Weights by name and seed, as tests/data/README.md defines them."""
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("inv_freq"):
            weights[name] = 1 / 10000 ** (torch.arange(0, 64, 2) / 64)
            continue
        generator = torch.Generator()
        generator.manual_seed((zlib.crc32(name.encode()) + 7919 * seed) & 0x7FFFFFFF)
        n = torch.randn(tuple(shape), generator=generator)
        if len(shape) == 1:
            weights[name] = 1 + 0.1 * n if name.endswith("weight") else 0.05 * n
        elif name.endswith(("gamma", "beta")):
            weights[name] = 0.1 * n
        elif "embed.weight" in name:
            weights[name] = 0.5 * n
        else:
            weights[name] = n / math.sqrt(math.prod(shape[1:]))
    return weights


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Tensor]]:
    """Tensors, metadata and the state dict (without its prefix) of a golden file."""
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = recipe(dict(json.loads(metadata["keys"])), int(metadata["weight_seed"]))
    return tensors, metadata, {key.split(".", 1)[1]: value for key, value in weights.items()}


def small_model(variant: str, seed: int = 0, **switches) -> DiT:
    """A tiny model of a family, every weight random (an untrained one would answer 0)."""
    text = None if variant == "cosyvoice3" else TextConfig(vocab=20, dim=16, layers=2)
    sizes = {"dim": 32, "depth": 2, "heads": 2, "head_dim": 16, "channels": 12}
    model = DiT(DiTConfig.for_variant(variant, text=text, **(sizes | switches)))
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    weights = recipe({k: v for k, v in shapes.items() if not k.endswith("inv_freq")}, seed)
    model.load_state_dict({"rotary_embed.inv_freq": model.rotary_embed.inv_freq, **weights})
    return model.eval()


def conditions(model: DiT | CausalUNet, lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    """Arguments of `prepare` for rows of these lengths: prompts over a third of each row."""
    generator = torch.Generator().manual_seed(seed)
    rows, frames, channels = len(lengths), max(lengths), model.config.channels

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    prompt = noise(rows, frames, channels)
    for row, length in enumerate(lengths):
        prompt[row, length // 3 :] = 0
    given = {"prompt": prompt, "lengths": torch.tensor(lengths)}
    if not isinstance(model, DiT) or model.config.text is None:
        return given | {"mu": noise(rows, frames, channels), "spks": noise(rows, channels)}
    text = torch.full((rows, max(lengths)), -1)
    for row, length in enumerate(lengths):
        count = max(length // 2, 1)
        text[row, :count] = torch.randint(model.config.text.vocab, (count,), generator=generator)
    return given | {"text": text}


def one_row(given: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """The row alone: batch 1, N = its duration."""
    length = int(given["lengths"][row])
    alone = {name: value[row : row + 1] for name, value in given.items()}
    for name in ("prompt", "mu"):
        if name in alone:
            alone[name] = alone[name][:, :length]
    return alone


def relative_rms(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())
