"""Padding waste and static memory of the default tier tables: `python -m benchmarks.buckets`.

Utterances: log-normal, median 5 s, sigma .6, within .8 to 30 s, after a 3.3 s prompt, at F5-TTS's
93.75 frames a second; batches as they arrive, unsorted.
"""

from __future__ import annotations

import math

import torch

from imf_kernels.graphs import DEFAULT, PACKED, waste
from imf_kernels.models import DiT, DiTConfig, TextConfig

REQUESTS = 20_000


def lengths() -> list[int]:
    """Frames of each request, prompt included."""
    z = torch.randn(REQUESTS, generator=torch.Generator().manual_seed(0))
    seconds = (5.0 * torch.exp(0.6 * z)).clamp(0.8, 30.0) + 3.3
    return [round(93.75 * s) for s in seconds.tolist()]


def static_bytes(rows: int, frames: int, guided: bool = False, nfe: int = 3) -> int:
    """Static buffers of one slot for F5-TTS base in bf16, the largest bucket as given."""
    config = DiTConfig.for_variant(
        "f5_v1", text=TextConfig(vocab=2545), dim=1024, depth=22, heads=16
    )
    with torch.device("meta"):
        model = DiT(config).bfloat16()
    branches = 1 + guided
    held = sum(
        math.prod(spec.shape(branches * rows, frames)) * (spec.dtype or model.dtype).itemsize
        for name, spec in model.specs.items()
        if name != "chunk"
    )
    held += sum(
        math.prod(spec.shape(rows, frames)) * (spec.dtype or model.dtype).itemsize
        for spec in model.inputs.values()
    )
    state = rows * frames * config.channels
    tables = nfe * (6 * config.depth + 2) * config.dim
    return held + 4 * (state + tables)


def table() -> str:
    found = lengths()
    lines = [
        "| rows in a request | padded tiers: padding | packed tiers: padding |",
        "|---|---|---|",
    ]
    for rows in (1, 2, 4, 8):
        batches = [found[i : i + rows] for i in range(0, REQUESTS, rows)]
        shares = []
        for tiers in (DEFAULT, PACKED):
            padding, missed = waste(tiers, batches)
            shares.append(f"{padding:.0%}" + (f" ({missed:.1%} fit none)" if missed else ""))
        lines.append(f"| {rows} | {shares[0]} | {shares[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
    for guided in (False, True):
        size = static_bytes(8, 3200, guided)
        print(f"static buffers of a slot, guided {guided}: {size / 2**20:.0f} MiB")
