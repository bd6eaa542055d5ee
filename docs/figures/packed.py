"""Rows padded to the longest, and packed behind one another."""

from __future__ import annotations

from itertools import accumulate

from matplotlib.figure import Figure

from docs.figures.source import digest

FILE, METADATA = "packed.svg", {"Date": None, "Source": digest(__file__)}
LENGTHS = (320, 180, 260)
COLORS = ("#0072B2", "#009E73", "#D55E00")


def draw() -> Figure:
    figure = Figure(figsize=(7, 2.2), layout="constrained")
    padded, packed = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    longest = max(LENGTHS)
    starts = list(accumulate(LENGTHS, initial=0))
    for row, (length, color) in enumerate(zip(LENGTHS, COLORS, strict=True)):
        padded.barh(row, length, color=color)
        padded.barh(row, longest - length, left=length, color="0.92", hatch="///", edgecolor="0.7")
        packed.barh(0, length, left=starts[row], color=color)
        for axes, left, height in ((padded, 0, row), (packed, starts[row], 0)):
            axes.text(left + length / 2, height, str(length), ha="center", va="center", color="w")
    padded.invert_yaxis()
    padded.set_title(f"padded: {len(LENGTHS) * longest} frames computed", loc="left", fontsize=10)
    packed.set_title(f"packed: {sum(LENGTHS)}", loc="left", fontsize=10)
    packed.set_xlabel("frames")
    for axes in (padded, packed):
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    return figure
