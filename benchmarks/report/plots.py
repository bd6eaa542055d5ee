"""A device's plots: RTF against NFE, the roofline, and where an evaluation's time goes.

Each takes what there is and gives None where that is nothing. The same input gives the same bytes,
with the same version of matplotlib.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from PIL import Image

from benchmarks.report.results import Record, Row, said
from benchmarks.report.tables import PAPER, REFERENCE, significant
from imf_kernels.files import replacing

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
COLORS = (*OKABE_ITO, "#882255")
"""Told apart by colour-blind readers too; markers differ as well."""
MARKERS = "os^vDP*X<>"
GREY = "#7F7F7F"


class Plot(NamedTuple):
    """A file, and what it shows to whoever cannot see it."""

    path: Path
    alt: str


def rtf(rows: Sequence[Row], device: str, path: Path) -> Plot | None:
    """A panel per model, a line per contender; guided ones dashed."""
    panels = [_most_steps(chosen) for chosen in _by_model(rows).values()]
    if not panels:
        return None
    names = dict.fromkeys(
        record.contender for rows in panels for row in rows for record in row.records
    )
    styles = _styles(names)
    steps = sorted({row.stated["nfe"] for rows in panels for row in rows})
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(1 + 4.5 * columns, 1 + 3.4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
    words = []
    for axis, chosen in zip(axes, panels, strict=False):
        title = said(chosen[0].stated, leave=("nfe", "guidance"))
        for name, guided, points in _curves(chosen):
            label = f"{name}, guided" if guided else name
            line = "--" if guided else "-"
            axis.plot(*zip(*points, strict=True), linestyle=line, label=label, **styles[name])
        if REFERENCE in device:
            _draw_paper(axis, chosen[0].stated["model"])
        _nfe_axis(axis, steps)
        axis.set(ylabel="RTF", yscale="log")
        axis.set_title(title, fontsize=9, loc="left")
        words.append(f"{title}: {_ends(chosen)}")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    _legend(figure, axes)
    _save(figure, path)
    return Plot(path, f"RTF against NFE on {device}. " + "; ".join(words))


def _by_model(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        whole = all(record.more.get("audio_seconds") for record in row.records)
        if row.test == "rtf" and whole and {"model", "nfe"} <= row.stated.keys():
            found.setdefault(row.stated["model"], []).append(row)
    return found


def _most_steps(rows: Sequence[Row]) -> list[Row]:
    """Of the rows that differ in NFE and guidance alone, those with the most NFEs."""
    alike: dict[str, list[Row]] = {}
    for row in rows:
        alike.setdefault(said(row.stated, leave=("nfe", "guidance")), []).append(row)
    return max(alike.values(), key=lambda rows: len({row.stated["nfe"] for row in rows}))


def _rtf(record: Record) -> float:
    return record.median / record.more["audio_seconds"]


def _curves(rows: Sequence[Row]) -> Iterator[tuple[str, bool, list[tuple[int, float]]]]:
    found: dict[tuple[str, bool], list[tuple[int, float]]] = {}
    for row in rows:
        for record in row.records:
            key = record.contender, bool(row.stated.get("guidance"))
            found.setdefault(key, []).append((row.stated["nfe"], _rtf(record)))
    for (name, guided), points in found.items():
        yield name, guided, sorted(points)


def _ends(rows: Sequence[Row]) -> str:
    """The smallest and the largest RTF, in words."""
    every = [(_rtf(record), record, row) for row in rows for record in row.records]
    ends = (pick(every, key=lambda each: each[0]) for pick in (min, max))
    return " to ".join(
        f"{significant(value)} ({record.contender}, NFE {row.stated['nfe']})"
        for value, record, row in ends
    )


def _draw_paper(axis: Axes, model: str) -> None:
    points = [(each.nfe, each.rtf) for each in PAPER if each.model == model]
    if points:
        style = {"color": GREY, "marker": "*", "markersize": 11, "linestyle": "none"}
        axis.plot(*zip(*points, strict=True), label="the paper", **style)


def roofline(
    rows: Sequence[Row], ceilings: Mapping[str, float] | None, device: str, path: Path
) -> Plot | None:
    """FLOP/s against FLOP a byte below the measured ceilings; time against the floor's time."""
    records = [r for row in rows for r in row.records if r.more.get("floor_seconds")]
    counted = [r for r in records if r.more.get("flops") and r.more.get("bytes")]
    if not records:
        return None
    styles = _styles(dict.fromkeys(_kind(record) for record in records))
    both = bool(counted and ceilings)
    figure = Figure(figsize=(5 + 5 * both, 5), layout="constrained")
    axes = figure.subplots(1, 1 + both, squeeze=False)[0]
    if ceilings and both:
        intensity = [r.more["flops"] / r.more["bytes"] for r in counted]
        _draw_roof(axes[0], ceilings["flops"], ceilings["bandwidth"], intensity)
        _scatter(axes[0], styles, counted, intensity, [r.more["flops"] / r.median for r in counted])
        axes[0].set(title="speed below the limit", xlabel="FLOP a byte", ylabel="FLOP/s")
    floors, times = [r.more["floor_seconds"] for r in records], [r.median for r in records]
    ends = [min(floors) / 2, max(floors) * 2]
    axes[-1].plot(ends, ends, color=GREY, label="the device's limit")
    axes[-1].plot(
        ends, [2 * end for end in ends], color=GREY, linestyle=":", label="twice its time"
    )
    _scatter(axes[-1], styles, records, floors, times)
    axes[-1].set(title="time above the floor", xlabel="floor, s", ylabel="measured, s")
    for axis in axes:
        axis.set(xscale="log", yscale="log")
    _legend(figure, axes)
    _save(figure, path)
    multiples = [time / floor for time, floor in zip(times, floors, strict=True)]
    spread = " to ".join(significant(end(multiples)) for end in (min, max))
    return Plot(
        path, f"Roofline of {device}: {len(records)} measurements, {spread} times the floor"
    )


def _draw_roof(axis: Axes, flops: float, bandwidth: float, intensity: Sequence[float]) -> None:
    ridge = flops / bandwidth
    corners = [min(*intensity, ridge) / 2, ridge, max(*intensity, ridge) * 2]
    roof = [min(flops, bandwidth * x) for x in corners]
    axis.plot(corners, roof, color=GREY, label="the device's limit")


def _kind(record: Record) -> str:
    return f"{record.test}: {record.contender}"


def _scatter(
    axis: Axes,
    styles: Mapping[str, Mapping[str, Any]],
    records: Sequence[Record],
    xs: Sequence[float],
    ys: Sequence[float],
) -> None:
    for name, style in styles.items():
        chosen = [i for i, r in enumerate(records) if _kind(r) == name]
        at = [xs[i] for i in chosen], [ys[i] for i in chosen]
        axis.plot(*at, linestyle="none", alpha=0.7, label=name, **style)


Parts = list[tuple[str, float]]
"""Names, and the time of each in whatever unit."""


def breakdown(panels: Mapping[str, Parts], device: str, path: Path) -> Plot | None:
    """Where the time of each goes: the longest ten parts of it, and all others."""
    shown = {title: _shares(parts) for title, parts in panels.items() if parts}
    if not shown:
        return None
    heights = [1 + 0.3 * len(shares) for shares in shown.values()]
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    axes = figure.subplots(len(shown), squeeze=False, height_ratios=heights).flatten()
    words = []
    for axis, (title, shares) in zip(axes, shown.items(), strict=True):
        names, values = zip(*shares.items(), strict=True)
        axis.bar_label(axis.barh(names, values, color=COLORS[0]), fmt="%.1f", padding=3)
        axis.invert_yaxis()
        axis.set(xlabel="share of the time, %")
        axis.set_title(title, fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        said_of = (f"{name} {share:.0f} %" for name, share in shares.items())
        words.append(f"{title}: {', '.join(said_of)}")
    _save(figure, path)
    return Plot(path, f"Where the time goes on {device}. {'; '.join(words)}")


def _shares(parts: Parts) -> dict[str, float]:
    """In percent; those called "others" are the last."""
    total = sum(time for _, time in parts)
    found: Counter[str] = Counter()
    named = sorted(((name, time) for name, time in parts if name != OTHERS), key=lambda p: -p[1])
    for name, time in named[:10]:
        found[name if len(name) <= 40 else f"{name[:39]}…"] += 100 * time / total
    others = 100 - found.total()
    return dict(found) | ({OTHERS: others} if others > 0.05 else {})


OTHERS = "others"


def kernels(found: Mapping[str, Any]) -> Parts:
    """Of what a profiler saw of an evaluation: microseconds in all, and those of the longest."""
    parts = [(each["name"], each["us"]) for each in found["top"]]
    return [*parts, (OTHERS, found["us"] - sum(us for _, us in parts))]


def evaluated(rows: Sequence[Row]) -> dict[str, Parts]:
    """The kernels of the first evaluation that was profiled."""
    for row in rows:
        for record in row.records:
            if record.more.get("kernels"):
                return {f"an evaluation, {said(row.stated)}": kernels(record.more["kernels"])}
    return {}


def profiled(found: Any) -> dict[str, Parts]:
    """Ranges without those inside them, and kernels, from `benchmarks.profile`; else nothing."""
    panels: dict[str, Parts] = {}
    for row in found.get("rows", []) if isinstance(found, dict) else []:
        if "ranges" in row:
            on_device = any(each["device self"] for each in row["ranges"])
            key = "device self" if on_device else "self"
            panels[f"{row['what']}, ranges"] = [(e["range"], e[key]) for e in row["ranges"]]
        elif "kernels" in row:
            panels[f"{row['what']}, kernels"] = kernels(row["kernels"])
    return panels


def _styles(names: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        name: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(sorted(names, key=lambda name: "plain" not in name))
    }


def _nfe_axis(axis: Axes, steps: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(steps, labels=[str(step) for step in steps])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.tick_params(labelbottom=True)  # the panel below may be hidden
    axis.set_xlabel("solver steps (NFE)")


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Below all panels, every label once."""
    handles = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    columns = 3 if figure.get_figwidth() > 6 else 1
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)


def _save(figure: Figure, path: Path) -> None:
    """In 128 colours: a fourth of the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    with replacing(path) as temporary, Image.open(drawn) as image:
        image.convert("RGB").quantize(128).save(temporary, format="png", optimize=True)
