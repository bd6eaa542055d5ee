"""The aims of this project's speed, and what of them is reached where."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report.results import Record, Row, Run
from benchmarks.report.tables import REFERENCE, quantity, significant, table

INTRODUCTION = """## The aims

Of F5 base in bfloat16 where nothing else is said; "ours" is a `GraphSampler`. A measured figure is
the worst of its rows, bold where it reaches the aim; a missing one waits for what its cell says
(`benchmarks/TUNING.md`). What is simulated is no measurement."""


class Place(NamedTuple):
    """A device's results: rows by test, and the files of other scripts; or a card's simulation."""

    rows: Mapping[str, Sequence[Row]]
    others: Mapping[str, Any]
    card: Mapping[str, Any] | None = None
    on_cpu: bool = False

    @classmethod
    def of(cls, folder: Path, runs: Iterable[Run]) -> Place:
        known: dict[str, list[Row]] = {}
        runs = list(runs)
        for run in runs:
            for row in run.rows()[0]:
                if "dependent_launch" not in row.stated:
                    known.setdefault(row.test, []).append(row)
        others = {
            name: json.loads((folder / f"{name}.json").read_text())["rows"]
            for name in ("f5_sampler", "distillation")
            if (folder / f"{name}.json").exists()
        }
        return cls(known, others, on_cpu=all(run.machine["device"] == "CPU" for run in runs))


Measure = Callable[[Place], Iterable[float]]


class Aim(NamedTuple):
    """What is to be at most (or at least) something, and how much better would be better still."""

    what: str
    aim: float
    stretch: float | None
    measure: Measure
    told: Callable[[float], str]
    least: bool = False
    reference: float | None = None
    """The aim on the reference device, if it is another."""
    needs: str = "a GPU"
    """What a row waits for that is not there; of what is counted, nothing."""

    def cells(self, places: Mapping[str, Place]) -> list[str]:
        bound = "at least" if self.least else "at most"
        aim = f"{bound} {self.told(self.aim)}"
        if self.reference is not None:
            aim += f" ({REFERENCE}: {self.told(self.reference)})"
        stretch = "" if self.stretch is None else self.told(self.stretch)
        figures = (self._figure(device, place) for device, place in places.items())
        return [self.what, aim, stretch, *figures]

    def _figure(self, device: str, place: Place) -> str:
        values = list(self.measure(place))
        if not values:
            silent = place.card is not None or not self.needs
            return "" if silent or (self.needs == CPU) > place.on_cpu else f"needs {self.needs}"
        aim = self.aim
        if self.reference is not None and REFERENCE in device:
            aim = self.reference
        worst = min(values) if self.least else max(values)
        reached = worst >= aim if self.least else worst <= aim
        told = self.told(worst)
        return f"**{told}**" if reached and place.card is None else told


CPU = "F5-TTS (`make bench-cpu`)"
"""Of rows that a CPU has."""


def section(places: Mapping[str, Place]) -> str:
    """A row per aim, a column per device."""
    titles = "what", "aim", "stretch", *places
    rows = [aim.cells(places) for aim in AIMS]
    return f"{INTRODUCTION}\n\n{table(titles, rows)}"


# -- what rows say ------------------------------------------------------------------------------


def _matching(place: Place, test: str, **stated: Any) -> list[Row]:
    asked = stated.items()
    return [
        row
        for row in place.rows.get(test, ())
        if all(row.stated.get(key) == value for key, value in asked)
        and row.stated.get("model", "f5_base") == "f5_base"
        and row.stated.get("dtype", "bfloat16") == "bfloat16"
        and not row.stated.keys() & {"depth", "vocoder"}
    ]


def _record(row: Row, name: str) -> Record | None:
    return next((record for record in row.records if record.contender == name), None)


def _of(test: str, name: str, value: Callable[[Record], float | None], **stated: Any) -> Measure:
    """A figure of one contender's records."""

    def measure(place: Place) -> Iterable[float]:
        records = (_record(row, name) for row in _matching(place, test, **stated))
        values = (value(record) for record in records if record is not None)
        return [each for each in values if each is not None]

    return measure


def _times(test: str, name: str, other: str, **stated: Any) -> Measure:
    """How many times as fast a contender is as another of the same row."""

    def measure(place: Place) -> Iterable[float]:
        for row in _matching(place, test, **stated):
            ours, theirs = _record(row, name), _record(row, other)
            if ours is not None and theirs is not None:
                yield theirs.median / ours.median

    return measure


def _any(*measures: Measure) -> Measure:
    return lambda place: [value for measure in measures for value in measure(place)]


def _ops(measure: Callable[..., Measure], names: Iterable[str], size: str) -> Measure:
    return _any(*(measure(op=op, size=size, **{"pass": "forward"}) for op in names))


def _bandwidth(**stated: Any) -> Measure:
    return _of("ops", "ours", lambda r: _divided(r.more.get("floor_seconds"), r.median), **stated)


def _against_inductor(**stated: Any) -> Measure:
    return _times("ops", "ours", "torch.compile", **stated)


def _floors(record: Record) -> float | None:
    return _divided(record.median, record.more.get("floor_seconds"))


def _libraries(record: Record) -> float | None:
    return _divided(record.median, record.more.get("library_seconds"))


def _divided(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


def _fp8_floors(place: Place) -> Iterable[float]:
    """Of bfloat16's floor."""
    for row in _matching(place, "evaluation", ragged=True):
        fp8, ours = _record(row, "ours, fp8"), _record(row, "ours")
        if fp8 is not None and ours is not None and ours.more.get("floor_seconds"):
            yield fp8.median / ours.more["floor_seconds"]


def _new_grid(place: Place) -> Iterable[float]:
    for row in _matching(place, "grid"):
        turning, staying = _record(row, "ours, graph"), _record(row, "ours, graph, one grid")
        if turning is not None and staying is not None:
            yield turning.median - staying.median


# -- what other scripts' results and simulations say --------------------------------------------


def _sampler(comparison: str) -> Measure:
    return lambda place: [
        row["ratio"]
        for row in place.others.get("f5_sampler", ())
        if row["comparison"].startswith(comparison)
    ]


def _interval(used: int) -> Measure:
    """Plain updates for an interval: 8 targets of a rollout of 8 sub-steps, used so often. Seconds,
    on a CPU FLOPs."""

    def measure(place: Place) -> Iterable[float]:
        costs = {
            (row["part"], row["run"]): row.get("seconds") or row.get("flops")
            for row in place.others.get("distillation", ())
        }
        keys = ("teacher", "NFE 0"), ("teacher", "NFE 8"), ("targets", "8 targets")
        plain, whole, targets = (costs.get(key) for key in keys)
        if plain and whole and targets:
            yield ((whole - plain) / used + targets) / 8 / plain

    return measure


def _memory(place: Place) -> Iterable[float]:
    """The most bytes of an update, of those of MeanFlow's with a recorded derivative."""
    found: dict[int, dict[str, float]] = {}
    for row in place.others.get("distillation", ()):
        if row["part"] == "jvp" and row["bytes"]:
            found.setdefault(row["rows"], {})[row["run"]] = row["bytes"]
    for held in found.values():
        if {"IntMeanFlow, NFE 8", "MeanFlow, jvp as published"} <= held.keys():
            yield held["IntMeanFlow, NFE 8"] / held["MeanFlow, jvp as published"]


def _simulated(case: str, value: Callable[[Mapping[str, Any]], float]) -> Measure:
    def measure(place: Place) -> Iterable[float]:
        cases = place.card["cases"] if place.card is not None else ()
        return [value(each) for each in cases if each["what"] == case]

    return measure


def _weights(kind: str) -> Measure:
    """Counted, wherever that was."""
    return lambda place: [] if place.card is None else [place.card["weights"][kind]]


def _launched(per: str | float) -> Callable[[Mapping[str, Any]], float]:
    """Microseconds, over another number of the case or so many."""
    return lambda case: case["launched"] / (case[per] if isinstance(per, str) else per)


# -- the aims -----------------------------------------------------------------------------------


def _times_told(value: float) -> str:
    return f"{significant(value)}x"


def _share_told(value: float) -> str:
    return f"{100 * value:.0f} %"


def _rtf_told(value: float) -> str:
    return f"{value:.5f}"


ELEMENTWISE = (
    "guided_euler_step",
    "mean_velocity_loss",
    "modulated_layer_norm",
    "gated_residual_norm",
    "residual_layer_norm",
    "rope_qkv",
    "rope_qkv in place",
)
ALL = (*ELEMENTWISE, "grouped_conv_mish", "depthwise_conv_norm", "grn_gelu", "causal_conv_norm")
TOLD = ("guided_euler_step", "grouped_conv_mish", "rope_qkv in place")
SOLVE = {"nfe": 3, "batch": 1, "guidance": False}
TEN = "10 s after a prompt of 3.3 s"

AIMS = (
    Aim(
        "elementwise ops of 64 MiB and more: of the copy's bandwidth",
        0.85,
        0.92,
        _ops(_bandwidth, ELEMENTWISE, "large"),
        _share_told,
        least=True,
    ),
    Aim(
        "fused ops at speech sizes, in a graph: as fast as Inductor's",
        0.95,
        None,
        _ops(_against_inductor, ALL, "speech"),
        _times_told,
        least=True,
    ),
    Aim(
        "the guided step, grouped convolutions and RoPE among them",
        1.2,
        1.5,
        _ops(_against_inductor, TOLD, "speech"),
        _times_told,
        least=True,
    ),
    Aim(
        f"one evaluation, {TEN}: of its floor",
        2.4,
        1.7,
        _any(
            _of("evaluation", "ours", _floors, seconds=10.0, batch=1),
            _simulated(f"evaluation, {TEN}", _launched("limit")),
        ),
        _times_told,
    ),
    Aim(
        "the same, of the best library's products and attention",
        1.15,
        None,
        _of("evaluation", "ours", _libraries, seconds=10.0, batch=1),
        _times_told,
    ),
    Aim(
        "one evaluation of 16384 packed frames: of its floor",
        1.5,
        None,
        _any(
            _of("evaluation", "ours", _floors, ragged=True),
            _simulated("evaluation, 16 packed rows", _launched("limit")),
        ),
        _times_told,
    ),
    Aim(
        "the same in FP8: of bfloat16's floor",
        1.0,
        None,
        _any(_fp8_floors, _simulated("evaluation, 16 packed rows, FP8", _launched("limit"))),
        _times_told,
        needs="a GPU with FP8",
    ),
    Aim(
        "3 steps, 10 s: as fast as F5-TTS's own sampler",
        4.0,
        None,
        _times("rtf", "ours, graph", "F5-TTS", seconds=10.0, **SOLVE),
        _times_told,
        least=True,
        needs="a GPU, F5-TTS",
    ),
    Aim(
        "3 steps, 10 s: as fast as torch.compile in one CUDA graph",
        1.3,
        None,
        _times("rtf", "ours, graph", "torch.compile, graph", seconds=10.0, **SOLVE),
        _times_told,
        least=True,
    ),
    Aim(
        "3 steps, 10 s: RTF (the paper 0.021)",
        0.0006,
        0.0004,
        _any(
            _of(
                "rtf",
                "ours, graph",
                lambda r: _divided(r.median, r.more.get("audio_seconds")),
                seconds=10.0,
                **SOLVE,
            ),
            _simulated(f"solve, {TEN}", _launched(10 * 1e6)),
        ),
        _rtf_told,
        reference=0.002,
    ),
    Aim(
        "3 steps, 1 s without a prompt",
        2.0e-3,
        1.2e-3,
        _any(
            _of("rtf", "ours, graph", lambda r: r.median, seconds=1.0, prompt=0.0, **SOLVE),
            _simulated("solve, 1 s without a prompt", _launched(1e6)),
        ),
        quantity,
    ),
    Aim(
        "3 steps, 1 s after a prompt of 3.3 s",
        2.6e-3,
        1.6e-3,
        _any(
            _of("rtf", "ours, graph", lambda r: r.median, seconds=1.0, prompt=3.3, **SOLVE),
            _simulated("solve, 1 s after a prompt of 3.3 s", _launched(1e6)),
        ),
        quantity,
    ),
    Aim("a new grid", 0.2e-3, 0.1e-3, _new_grid, quantity),
    Aim(
        "guided rollout, 8 sub-steps, 38400 frames, padded: as fast as eager PyTorch",
        1.3,
        None,
        _times("rollout", "ours", "plain", nfe=8),
        _times_told,
        least=True,
    ),
    Aim(
        "the same, packed",
        1.3,
        2.0,
        _times("rollout", "ours, packed", "plain", nfe=8),
        _times_told,
        least=True,
    ),
    Aim(
        "the same, packed, in FP8",
        1.3,
        2.0,
        _times("rollout", "ours, packed, fp8", "plain", nfe=8),
        _times_told,
        least=True,
        needs="a GPU with FP8",
    ),
    Aim(
        "the same, padded, as torch.compile",
        1.0,
        None,
        _times("rollout", "ours", "torch.compile", nfe=8),
        _times_told,
        least=True,
        needs="a GPU, `make bench-gpu-full`",
    ),
    Aim(
        "8 intervals of a rollout of 8 sub-steps: plain updates for each (the paper 3.1 for one)",
        1.55,
        1.2,
        _interval(used=1),
        _times_told,
    ),
    Aim("the same, the rollout used 4 times", 1.55, 1.2, _interval(used=4), _times_told),
    Aim("memory of an update: of MeanFlow's with a recorded JVP", 0.5, 1 / 3, _memory, _share_told),
    Aim(
        "weights of a baked student: of the checkpoint's",
        0.6,
        None,
        _weights("baked"),
        _share_told,
        needs="",
    ),
    Aim("the same in FP8", 0.6, 0.3, _weights("FP8"), _share_told, needs=""),
    Aim(
        "CPU, float32, equal steps: as fast as F5-TTS's own sampler",
        1.15,
        1.25,
        _sampler("equal"),
        _times_told,
        least=True,
        needs=CPU,
    ),
    Aim(
        "CPU, 3 steps against F5-TTS's 32 guided",
        22.0,
        40.0,
        _sampler("default"),
        _times_told,
        least=True,
        needs=CPU,
    ),
)
