"""The models and requests that are measured, all random; their error, and their floor."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from benchmarks.timing import Ceilings
from imf_kernels.models import DiT, DiTConfig, TextConfig

SIZES = {
    "f5_base": ("f5_v1", {"dim": 1024, "depth": 22, "heads": 16}, 93.75),
    "cosyvoice3": ("cosyvoice3", {"dim": 1024, "depth": 22, "heads": 16}, 50.0),
    "tiny": ("f5_v1", {"dim": 64, "depth": 2, "heads": 1}, 93.75),
}
VOCABULARY = 2545
PROMPT_SECONDS = 3.3


def build(name: str, device: torch.device, dtype: torch.dtype) -> tuple[DiT, float]:
    """A student with random weights (an untrained one would answer 0), and its frames a second."""
    variant, sizes, rate = SIZES[name]
    text = TextConfig(vocab=VOCABULARY) if variant.startswith("f5") else None
    torch.manual_seed(0)
    with device:
        model = DiT(DiTConfig.for_variant(variant, text=text, mixer=True, **sizes))
        for name, parameter in model.named_parameters():
            if "linear" in name or "proj_out" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    model = model.to(dtype).eval().requires_grad_(False)
    model.fuse_weights()
    return model, rate


def request(
    model: DiT, rows: int, frames: int, prompt: int, lengths: Sequence[int] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Noise, and the arguments of `prepare`; `lengths` in place of rows that are all full."""
    device, channels = model.proj_out.weight.device, model.config.channels
    given = {
        "prompt": torch.randn(rows, frames, channels, device=device),
        "lengths": torch.tensor(lengths or [frames] * rows, device=device),
    }
    given["prompt"][:, prompt:] = 0
    if model.text_embed is not None:
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


def floor(model: DiT, lengths: Iterable[int], nfe: int, ceilings: Ceilings) -> float:
    """Milliseconds of one solve at the device's limit: GEMMs, convolutions, attention, weights.

    `lengths` are the frames of every row that is evaluated.
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
    return 1e3 * nfe * max(flops / ceilings.flops, weights / ceilings.bandwidth)


def error(got: Tensor, want: Tensor) -> float:
    """Relative RMS; of what should be 0, absolute; NaN wherever one is."""
    got, want = got.to(want.dtype), want.detach()
    scale = want.square().mean().sqrt()
    return float((got.detach() - want).square().mean().sqrt() / torch.where(scale > 0, scale, 1.0))


def wrong(errors: Iterable[float], plain: Iterable[float]) -> bool:
    """Whether any error is more than twice that of the same computation in plain PyTorch."""
    pairs = zip(errors, plain, strict=True)
    return not all(error <= 2 * allowed + 1e-5 for error, allowed in pairs)
