"""The report's figures: spectrograms of one utterance, and quality against solver steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter
from torch import Tensor

from examples.quickstart.audio import HOP, SAMPLE_RATE, natural_log_mel
from imf_kernels.files import replacing

DPI = 144


@dataclass(frozen=True, slots=True)
class _Curve:
    """How the rows of one model and grid are drawn (colours: Okabe-Ito, safe for colour-blind)."""

    model: str
    grid: str
    label: str
    color: str
    marker: str
    line: str


_CURVES = (
    _Curve("teacher", "uniform", "teacher, guided", "#0072B2", "o", "-"),
    _Curve("teacher", "sway", "teacher, guided, sway grid", "#56B4E9", "s", "--"),
    _Curve("teacher", "o3s", "teacher, guided, O3S grid", "#0072B2", "*", ":"),
    _Curve("teacher_unguided", "uniform", "teacher, unguided", "#7F7F7F", "v", "-"),
    _Curve("teacher_unguided", "sway", "teacher, unguided, sway grid", "#7F7F7F", "s", "--"),
    _Curve("student", "uniform", "student", "#D55E00", "o", "-"),
    _Curve("student", "sway", "student, sway grid", "#E69F00", "s", "--"),
    _Curve("student", "o3s", "student, O3S grid", "#E69F00", "*", ":"),
)

_PANELS = (  # metric, title, ideal value, scale
    ("to_teacher", "distance to the teacher's fine solve", 0.0, "linear"),
    ("frechet", "Fréchet distance of mel patches", None, "log"),
    ("c2st", "classifier two-sample accuracy", 0.5, "linear"),
    ("sharpness", "sharpness, relative to the truth", 1.0, "linear"),
)


def draw_spectrograms(
    path: Path, title: str, mels: Mapping[str, Tensor], prompt_frames: int = 0
) -> None:
    """Write the log-mels of one utterance as a PNG, in two columns read downwards.

    Args:
        path: Where to write.
        title: Above the figure; the text that is spoken.
        mels: Label to `(N, 80)` normalised log-mel; the colour scale is that of the first one.
        prompt_frames: Frames that were given, not generated; marked by a line.
    """
    images = {label: natural_log_mel(mel.detach().float().cpu()) for label, mel in mels.items()}
    first = next(iter(images.values()))
    low, high = first.min().item(), first.max().item()
    rows = (len(images) + 1) // 2
    figure = Figure(figsize=(10, 0.6 + 1.55 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False)
    # An odd count leaves the top right cell free, so that the few-step columns end side by side.
    cells = [*axes[:, 0], *axes[2 * rows - len(images) :, 1]]
    for cell, (label, image) in zip(cells, images.items(), strict=True):
        seconds = (len(image) - 0.5) * HOP / SAMPLE_RATE
        drawn = cell.imshow(
            image.T.numpy(),
            origin="lower",
            aspect="auto",
            cmap="magma",
            vmin=low,
            vmax=high,
            extent=(-0.5 * HOP / SAMPLE_RATE, seconds, -0.5, image.shape[1] - 0.5),
            interpolation="nearest",
        )
        cell.set_title(label, fontsize=10, loc="left")
        if prompt_frames:
            boundary = (prompt_frames - 0.5) * HOP / SAMPLE_RATE
            cell.axvline(boundary, color="white", linestyle="--", linewidth=1)
    for cell in axes.flat:
        cell.set_visible(cell in cells)
    for cell in axes[:, 0]:
        cell.set_ylabel("mel channel")
    for cell in axes[-1]:
        cell.set_xlabel("time (s)")
    figure.colorbar(drawn, ax=axes, label="log mel magnitude", aspect=40, pad=0.01)
    figure.suptitle(title + (" (left of the line: the prompt)" if prompt_frames else ""))
    _save(figure, path)


def draw_curves(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write four metrics against the number of solver steps as a PNG.

    Args:
        path: Where to write.
        rows: Mappings with "model", "grid", "nfe" and the metrics; a missing or None metric is
            left out.
    """
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for panel, (metric, title, ideal, scale) in zip(axes.flat, _PANELS, strict=True):
        for curve in _CURVES:
            points = sorted(
                (row["nfe"], row[metric])
                for row in rows
                if (row["model"], row["grid"]) == (curve.model, curve.grid)
                and row.get(metric) is not None
            )
            if points:
                panel.plot(
                    *zip(*points, strict=True),
                    color=curve.color,
                    marker=curve.marker,
                    markersize=11 if curve.marker == "*" else 6,
                    linestyle=curve.line,
                    label=curve.label,
                )
        if ideal is not None:
            panel.axhline(ideal, color="#009E73", linewidth=1, linestyle=(0, (1, 2)), label="ideal")
        panel.set_yscale(scale)
        if scale == "log":
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            panel.yaxis.set_minor_locator(NullLocator())
        panel.set_title(title, fontsize=11, loc="left")
        _step_axis(panel, sorted({row["nfe"] for row in rows}))
    handles = {  # by label, each once: a panel may lack a curve
        label: handle
        for panel in axes.flat
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    labels = [label for label in (*(c.label for c in _CURVES), "ideal") if label in handles]
    figure.legend([handles[label] for label in labels], labels, loc="outside lower center", ncols=4)
    _save(figure, path)


def _step_axis(panel: Axes, steps: Sequence[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(steps))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xticks(steps, labels=[str(step) for step in steps])
    panel.set_xlabel("solver steps (NFE)")
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.15)
