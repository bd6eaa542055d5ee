"""The models and requests that are measured, all random; their error, and their floor."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Ceilings
from imf_kernels.models import CausalUNet, CausalUNetConfig, DiT, DiTConfig, TextConfig

F5_BASE = {"dim": 1024, "depth": 22, "heads": 16}
F5_SMALL = {"dim": 768, "depth": 18, "heads": 12}
SIZES: dict[str, tuple[str, dict[str, int], float]] = {
    "f5_base": ("f5_v1", F5_BASE, 93.75),
    "f5_small": ("f5_v1", F5_SMALL, 93.75),
    "cosyvoice2": ("cosyvoice2", {}, 50.0),
    "cosyvoice3": ("cosyvoice3", F5_BASE, 50.0),
    "tiny": ("f5_v1", {"dim": 64, "depth": 2, "heads": 1}, 93.75),
    "tiny_cosyvoice2": ("cosyvoice2", {"dim": 32, "mid_blocks": 1, "depth": 1, "heads": 1}, 50.0),
    "tiny_cosyvoice3": ("cosyvoice3", {"dim": 64, "depth": 2, "heads": 1}, 50.0),
}
"""The family of every model, its sizes, and mel frames a second."""
VOCABULARY = 2545
PROMPT_SECONDS = 3.3


def build(
    name: str, device: torch.device, dtype: torch.dtype, depth: int | None = None
) -> tuple[Any, float]:
    """A student with random weights (an untrained DiT would answer 0), and its frames a second.

    It equals a teacher with the same weights: its mixer is the identity. `depth` cuts it.
    """
    family, sizes, rate = SIZES[name]
    sizes = sizes if depth is None else {**sizes, "depth": depth}
    torch.manual_seed(0)
    with device:
        if family == "cosyvoice2":
            model: Any = CausalUNet(CausalUNetConfig(mixer=True, **sizes))
        else:
            text = TextConfig(vocab=VOCABULARY) if family.startswith("f5") else None
            model = DiT(DiTConfig.for_variant(family, text=text, mixer=True, **sizes))
        for key, parameter in model.named_parameters():
            if isinstance(model, DiT) and ("linear" in key or "proj_out" in key):
                torch.nn.init.normal_(parameter, std=0.02)
    model = model.to(dtype).eval().requires_grad_(False)
    model.fuse_weights()
    return model, rate


def request(
    model: Any, rows: int, frames: int, prompt: int, lengths: Sequence[int] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Noise, and the arguments of `prepare`; `lengths` in place of rows that are all full."""
    device, channels = model.last.weight.device, model.config.channels
    given = {
        "prompt": torch.randn(rows, frames, channels, device=device),
        "lengths": torch.tensor(lengths or [frames] * rows, device=device),
    }
    given["prompt"][:, prompt:] = 0
    if "text" in model.inputs:
        given["text"] = torch.randint(VOCABULARY, (rows, max(frames // 6, 1)), device=device)
    else:
        given["mu"] = torch.randn(rows, frames, channels, device=device)
        given["spks"] = torch.randn(rows, channels, device=device)
    return torch.randn(rows, frames, channels, device=device), given


def ragged_lengths(total: int, shortest: int, longest: int) -> list[int]:
    """Frames of a batch's rows, drawn evenly, always the same: `total` in all, the last row cut."""
    draw = random.Random(0)
    lengths: list[int] = []
    while sum(lengths) < total:
        lengths.append(draw.randint(shortest, longest))
    lengths[-1] -= sum(lengths) - total
    return lengths


def work(model: DiT, lengths: Iterable[int], nfe: int) -> tuple[float, float]:
    """FLOPs and bytes that a solve cannot do without: GEMMs, convolutions, attention, weights.

    `lengths` are the frames of every row that is evaluated, those of both branches when guided.
    """
    config = model.config
    dim, inner = config.dim, config.heads * config.head_dim
    per_frame = config.depth * (8 * dim * inner + 4 * config.ff_mult * dim * dim)
    per_frame += 2 * 2 * 31 * dim * dim // 16 + 4 * dim * config.channels
    flops = sum(n * (per_frame + config.depth * 4 * n * inner) for n in lengths)
    weights = sum(
        p.nbytes
        for name, p in model.named_parameters()
        if "norm" not in name and "text" not in name
    )
    return nfe * flops, nfe * weights


def floor(model: DiT, lengths: Iterable[int], nfe: int, ceilings: Ceilings) -> float:
    """Seconds of one solve at the device's limit."""
    return limit(*work(model, lengths, nfe), ceilings)


def limit(flops: float, nbytes: float, ceilings: Ceilings) -> float:
    return max(flops / ceilings.flops, nbytes / ceilings.bandwidth)


def error(got: Tensor, want: Tensor) -> float:
    """Relative RMS; of what should be 0, absolute; NaN wherever one is."""
    got, want = got.to(want.dtype), want.detach()
    scale = want.square().mean().sqrt()
    return float((got.detach() - want).square().mean().sqrt() / torch.where(scale > 0, scale, 1.0))


def allowed(plain: float) -> float:
    """The largest error, where the same computation in plain PyTorch has this one."""
    return 2 * plain + 1e-5


def worst(errors: list[float], bounds: list[float]) -> tuple[float, float]:
    """The error that is farthest beyond its bound, or nearest to it; a NaN is."""
    pairs = list(zip(errors, bounds, strict=True))
    return max(pairs, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0] / pair[1])
