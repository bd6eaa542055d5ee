"""How many of F5-TTS base's weights depend on the time alone."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from docs.figures.source import digest
from imf_kernels.models import DiT, DiTConfig, TextConfig

FILE, METADATA = "weights.svg", {"Date": None, "Source": digest(__file__)}


def draw() -> Figure:
    text = TextConfig(vocab=2545, dim=512, layers=4)
    config = DiTConfig.for_variant("f5_v1", text=text, dim=1024, depth=22, heads=16)
    with torch.device("meta"):
        whole, baked = DiT(config), DiT(config).baked()
    every, kept = (sum(p.numel() for p in model.parameters()) / 1e6 for model in (whole, baked))

    figure = Figure(figsize=(7, 1.5))
    axes = figure.subplots()
    axes.barh(0, kept, color="#0072B2")
    axes.barh(0, every - kept, left=kept, color="#E69F00")
    for left, width, label, ink in (
        (0, kept, "text, attention, MLP", "white"),
        (kept, every - kept, "time embedding, modulation", "black"),
    ):
        said = f"{label}\n{width:.0f} M, {100 * width / every:.0f} %"
        axes.text(left + width / 2, 0, said, ha="center", va="center", color=ink)
    axes.set(xlim=(0, every), yticks=[], xlabel="million weights")
    axes.spines["left"].set_visible(False)
    return figure
