"""Paths of a flow, and from one noise a step along the tangent and one along the chord."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from docs.figures import toy
from docs.figures.source import digest
from docs.figures.toy import Mixture
from imf_kernels import sampler

FILE = "mean_velocity.svg"
METADATA = {"Date": None, "Source": digest(__file__, toy.__file__)}


def draw() -> Figure:
    noise = torch.linspace(-2.2, 2.2, 23)[:, None, None]
    start = 15
    paths = sampler.sample(Mixture(), noise, grid="uniform", nfe=200, intermediates=True)[..., 0, 0]
    step = sampler.sample(Mixture(), noise, grid="uniform", nfe=1)[..., 0, 0]
    times = torch.linspace(0, 1, len(paths))

    figure = Figure(figsize=(7, 3.4))
    axes = figure.subplots()
    axes.plot(times, paths, color="0.8", linewidth=0.8)
    axes.plot(times, paths[:, start], color="#0072B2", linewidth=2, label="the teacher, fine")
    ends = float(noise[start]), float(step[start])
    axes.plot([0, 1], ends, "--o", color="0.35", label="one step of its velocity, the tangent")
    ends = float(noise[start]), float(paths[-1, start])
    axes.plot([0, 1], ends, "-o", color="#D55E00", label="one step of the mean velocity, the chord")
    axes.set(xlabel="time: 0 noise, 1 data", ylabel="state")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure
