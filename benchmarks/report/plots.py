"""A device's plots: RTF against NFE, the roofline, and where an evaluation's time goes.

Each takes what there is and gives None where that is nothing. The same input gives the same bytes,
with the same version of matplotlib.
"""

from __future__ import annotations

import io
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

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, told apart by colour-blind readers too; markers differ as well."""
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
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(1 + 4.5 * columns, 1 + 3.4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    said_of = []
    for axis, chosen in zip(axes, panels, strict=False):
        stated = chosen[0].stated
        title = said(stated, leave=("nfe", "guidance"))
        for name, guided, points in _curves(chosen):
            label = f"{name}, guided" if guided else name
            line = "--" if guided else "-"
            axis.plot(*zip(*points, strict=True), linestyle=line, label=label, **styles[name])
        if REFERENCE in device:
            _draw_paper(axis, stated["model"])
        _nfe_axis(axis, sorted({row.stated["nfe"] for row in chosen}))
        axis.set(title=title, ylabel="RTF", yscale="log")
        said_of.append(f"{title}: {_best(chosen)}")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    _legend(figure, axes)
    _save(figure, path)
    return Plot(path, f"RTF against NFE on {device}. " + "; ".join(said_of))


def _by_model(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        whole = all(record.more.get("audio_seconds") for record in row.records)
        if row.suite == "rtf" and whole and {"model", "nfe"} <= row.stated.keys():
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


def _best(rows: Sequence[Row]) -> str:
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
        at = [r.more["flops"] / r.more["bytes"] for r in counted]
        flops, bandwidth = ceilings["flops"], ceilings["bandwidth"]
        ridge = flops / bandwidth
        corners = [min(*at, ridge) / 2, ridge, max(*at, ridge) * 2]
        roof = [min(flops, bandwidth * x) for x in corners]
        axes[0].plot(corners, roof, color=GREY, label="the device's limit")
        _scatter(axes[0], styles, counted, at, [r.more["flops"] / r.median for r in counted])
        axes[0].set(title="speed below the limit", xlabel="FLOP a byte", ylabel="FLOP/s")
    floors, times = [r.more["floor_seconds"] for r in records], [r.median for r in records]
    ends = [min(floors), max(floors)]
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


def _kind(record: Record) -> str:
    return f"{record.suite}: {record.contender}"


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


def breakdown(profile: Any, device: str, path: Path) -> Plot | None:
    """The operators that an evaluation's time goes to; the ranges where those are not known.

    `profile` is what `benchmarks.profile` wrote; nothing is drawn of another script's results.
    """
    if not isinstance(profile, dict):
        return None
    found = profile.get("operators") or profile.get("ranges") or []
    parts = sorted(((each["name"], each["seconds"]) for each in found), key=lambda part: -part[1])
    total = sum(seconds for _, seconds in parts)
    if not total:
        return None
    shown, rest = parts[:10], sum(seconds for _, seconds in parts[10:])
    if rest:
        shown.append((f"{len(parts) - 10} others", rest))
    shares = [100 * seconds / total for _, seconds in shown]
    figure = Figure(figsize=(8, 1 + 0.35 * len(shown)), layout="constrained")
    axis = figure.subplots()
    bars = axis.barh([name for name, _ in shown], shares, color=COLORS[0])
    axis.bar_label(bars, fmt="%.1f", padding=3)
    axis.invert_yaxis()
    axis.set(xlabel="share of the time, %")
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
    words = ", ".join(
        f"{name} {share:.0f} %" for (name, _), share in zip(shown, shares, strict=True)
    )
    return Plot(path, f"Where the time of an evaluation goes on {device}. {words}")


def _styles(names: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        name: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(names)
    }


def _nfe_axis(axis: Axes, steps: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(steps, labels=[str(step) for step in steps])
    axis.xaxis.set_minor_locator(NullLocator())
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
    columns = 3 if len(handles) > 1 else 1
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)


def _save(figure: Figure, path: Path) -> None:
    """In 128 colours: a fourth of the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    with replacing(path) as temporary, Image.open(drawn) as image:
        image.convert("RGB").quantize(128).save(temporary, format="png", optimize=True)
