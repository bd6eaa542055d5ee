"""O3S over the middle time of two steps: the metric's curve, and where it was evaluated."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from docs.figures import toy
from docs.figures.source import digest
from docs.figures.toy import Mixture
from imf_kernels import o3s, sampler

FILE = "search.svg"
METADATA = {"Date": None, "Source": digest(__file__, toy.__file__)}


def draw() -> Figure:
    noise = torch.linspace(-2.2, 2.2, 201)[:, None, None]
    fine = sampler.sample(Mixture(), noise, grid="uniform", nfe=200)

    def distance(grid: torch.Tensor) -> float:
        return float((sampler.sample(Mixture(), noise, grid=grid) - fine).square().mean().sqrt())

    found = o3s.search(distance, nfe=2, higher_is_better=False)
    middles = torch.linspace(0.02, 0.98, 97).tolist()

    figure = Figure(figsize=(7, 3))
    axes = figure.subplots()
    axes.plot(middles, [distance(torch.tensor([0, t, 1])) for t in middles], color="0.6")
    asked = [(float(e.grid[1]), e.value) for e in found.evaluations]
    axes.scatter(*zip(*asked, strict=True), color="#0072B2", s=18, label="evaluated")
    axes.plot(*asked[0], "s", color="0.35", label="the uniform grid")
    axes.plot(float(found.grid[1]), found.value, "*", color="#D55E00", ms=12, label="found")
    axes.set(xlabel="middle time of two steps", ylabel="distance to the fine solve", ylim=(0, None))
    axes.legend(frameon=False)
    return figure
