"""Rows as Markdown tables: a line per row, a column per contender."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.report.ratios import ratio
from benchmarks.report.results import Record, Row, said

REFERENCE = "A100"
"""What the name of the reference device holds: the paper's."""


class Test(NamedTuple):
    """A title, what its numbers are, and what else of a record is shown."""

    title: str
    what: str = ""
    counted: tuple[str, ...] = ()
    differs: bool = False
    """Seconds more than the baseline are told, in place of how many times as fast."""


TESTS = {
    "rtf": Test(
        "Real-time factor",
        "Seconds of the flow module (with a vocoder where one is named) for a second of generated "
        "audio; the batch's audio together.",
        ("weight_bytes", "bytes_held"),
    ),
    "evaluation": Test("One evaluation", "Of the model alone.", ("library_seconds",)),
    "ranges": Test(
        "Ranges",
        "What a range for profilers costs: off, as by default, and on.",
        differs=True,
    ),
    "latency": Test(
        "Latency",
        "From a request to its result, a burst's median; requests of mixed lengths, from several "
        "threads.",
        ("p50", "p99", "requests_a_second"),
    ),
    "ops": Test("Ops", "A call of one fused op."),
    "training": Test(
        "Training", "An update of the student, the teacher's rollout inside.", ("bytes_held",)
    ),
    "rollout": Test("The teacher's rollout", "All its steps, both branches."),
    "jvp": Test("MeanFlow's derivative", "An update, in float32.", ("bytes_held",)),
    "search": Test("Step search", "A whole O3S search.", ("captures", "evaluations")),
    "grid": Test("A new grid", "A solve on another grid than the solve before it had."),
}
"""Others go by their own name."""

COUNTED = {
    "p50": lambda value: f"p50 {quantity(value)}",
    "p99": lambda value: f"p99 {quantity(value)}",
    "weight_bytes": lambda value: f"{size(value)} of weights",
    "bytes_held": lambda value: f"{size(value)} held",
    "requests_a_second": lambda value: f"{significant(value)} requests a second",
    "library_seconds": lambda value: f"the libraries' products and attention {quantity(value)}",
    "captures": lambda value: f"{value} captures",
    "evaluations": lambda value: f"{value} evaluations",
}


class Published(NamedTuple):
    """A figure of the paper, on an A100."""

    task: str
    name: str
    model: str
    nfe: int
    guided: bool
    rtf: float


PAPER = (
    Published("text-to-mel", "F5-TTS, the teacher", "f5_base", 32, True, 0.243),
    Published("text-to-mel", "IntMeanFlow with O3S", "f5_base", 3, False, 0.021),
    Published("text-to-mel", "IntMeanFlow with O3S", "f5_base", 2, False, 0.013),
    Published("text-to-mel", "IntMeanFlow", "f5_base", 1, False, 0.009),
    Published("token-to-mel", "CosyVoice2, the teacher", "cosyvoice2", 32, True, 0.510),
    Published("token-to-mel", "IntMeanFlow", "cosyvoice2", 1, False, 0.026),
)
"""arXiv 2510.07979."""


def published(row: Mapping[str, Any]) -> float | None:
    """The paper's RTF of such a row: its model, uncut, NFE and guidance, an utterance at a time."""
    if row.get("batch", 1) != 1 or row.keys() & {"depth", "vocoder"}:
        return None
    asked = row.get("model"), row.get("nfe"), bool(row.get("guidance"))
    found = {(each.model, each.nfe, each.guided): each.rtf for each in PAPER}
    return found.get(asked)


def paper_table() -> str:
    rows = [
        (each.task, each.name, str(each.nfe), "yes" if each.guided else "no", f"{each.rtf:.3f}")
        for each in PAPER
    ]
    return table(("task", "model", "NFE", "guidance", "RTF"), rows)


def test_tables(rows: Sequence[Row], device: str) -> Iterator[str]:
    """Of one test's rows: a table per model. The paper's figures stand beside an A100's."""
    models = dict.fromkeys(row.stated.get("model") for row in rows)
    for model in models:
        yield _rows_table([row for row in rows if row.stated.get("model") == model], device)


def _rows_table(rows: Sequence[Row], device: str) -> str:
    keys = dict.fromkeys(key for row in rows for key in row.stated)
    common = {
        key: rows[0].stated.get(key)
        for key in keys
        if all(row.stated.get(key) == rows[0].stated.get(key) for row in rows)
    }
    lists = {key for key in keys if any(isinstance(row.stated.get(key), list) for row in rows)}
    varying = [key for key in keys if key not in common and key not in lists]
    baselines = [row.baseline.contender for row in rows]
    others = [record.contender for row in rows for record in row.records]
    contenders = list(dict.fromkeys([*baselines, *others]))
    figures = [published(row.stated) if REFERENCE in device else None for row in rows]
    beside = ["the paper"] if any(figures) else []
    lines = []
    for row, figure in zip(rows, figures, strict=True):
        cells = {record.contender: _cell(record, row.baseline) for record in row.records}
        lines.append(
            [
                *(_stated(row.stated.get(key)) for key in varying),
                *(cells.get(name, "") for name in contenders),
                *([f"{figure:.3f}" if figure else ""] if beside else []),
            ]
        )
    titles = [*(key.replace("_", " ") for key in varying), *contenders, *beside]
    heading = said(common)
    return "\n\n".join(
        part for part in (heading and f"**{heading}**", table(titles, lines)) if part
    )


def _cell(record: Record, baseline: Record) -> str:
    """RTF or time; against the baseline; against the floor; what was counted."""
    audio, floor = record.more.get("audio_seconds"), record.more.get("floor_seconds")
    test = TESTS.get(record.test, Test(""))
    parts = [significant(record.median / audio) if audio else quantity(record.median)]
    if record is baseline:
        parts.append("baseline")
    elif test.differs:
        parts.append(f"{quantity(record.median - baseline.median)} more")
    else:
        found = ratio(baseline.seconds, record.seconds, paired=True)
        sure = f" ({significant(found.low)} to {significant(found.high)})" if found.known else ""
        parts.append(f"{significant(found.value)}x{sure}")
    if floor:
        parts.append(f"{significant(record.median / floor)}x the floor")
    parts += [COUNTED[key](record.more[key]) for key in test.counted if record.more.get(key)]
    return "<br>".join(parts)


def _stated(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    cells = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def quantity(seconds: float) -> str:
    """Such as "12.3 ms"."""
    units = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9))
    unit, one = next((each for each in units if abs(seconds) >= each[1]), units[-1])
    return f"{significant(seconds / one)} {unit}"


def size(nbytes: float) -> str:
    """Such as "12.3 MiB"."""
    unit, power = ("GiB", 30) if nbytes >= 2**30 else ("MiB", 20)
    return f"{significant(nbytes / 2**power)} {unit}"


def significant(value: float) -> str:
    """Three digits, and all before the point: "0.0120", "12.3", "1234"."""
    if not math.isfinite(value):
        return str(value)
    exponent = int(f"{value:.2e}".partition("e")[2])
    return f"{value:.{max(2 - exponent, 0)}f}"
