"""What cards that were not at hand would take, and what kernels compiled for them need."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report.aims import Place
from benchmarks.report.tables import quantity, significant, table

INTRODUCTION = """## Simulated

No measurement: F5 base in bfloat16 on cards whose ceilings are known, from the shapes of its
operations and the grids and resources of its compiled kernels (how: `benchmarks/simulate.py`). The
limit is that of FLOPs and weights alone; the floor has every operation's bytes from memory; waves
are whole ones; launched adds {launch} for each of a graph's launches. Solves are of 3 steps without
guidance, with their `prepare` and with their grid's tables at hand."""

DETAILED = (
    "evaluation, 10 s after a prompt of 3.3 s",
    "evaluation, 16 packed rows, FP8",
    "solve, 1 s after a prompt of 3.3 s",
    "solve, 1 s without a prompt",
)
"""Cases whose operations are shown."""
LEAST = 0.01
"""Of a case's time: operations with less are one row."""

COMPILED = """### Compiled kernels

The most of all forms and dtypes (Triton {triton}), and of the 64 warps of a multiprocessor the
fewest that are resident (`python -m benchmarks.kernels`)."""


def load(folder: Path) -> list[dict[str, Any]]:
    """The JSON files of `benchmarks.simulate` and `benchmarks.kernels`."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def places(folder: Path) -> dict[str, Place]:
    """The cards, for the aims."""
    cards = [each for each in load(folder) if "cases" in each]
    return {f"{card['card']}, simulated": Place({}, {}, card) for card in cards}


def section(folder: Path) -> Iterator[str]:
    found = load(folder)
    cards = [each for each in found if "cases" in each]
    if cards:
        yield INTRODUCTION.format(launch=quantity(cards[0]["launch"]))
    for card in cards:
        yield f"### {card['card']}, simulated"
        yield _cases(card["cases"])
        for case in card["cases"]:
            if case["what"] in DETAILED:
                yield f"**{case['what']}**"
                yield _operations(case)
    for each in found:
        if "kernels" in each:
            yield COMPILED.format(triton=each["versions"]["triton"])
            yield _kernels(each["kernels"])


def _cases(cases: Sequence[Mapping[str, Any]]) -> str:
    titles = "what", "frames", "launches", "limit", "floor", "waves", "launched", "of the limit"
    return table(
        titles,
        [
            (
                case["what"],
                str(case["frames"]),
                str(case["launches"]),
                *(_us(case[key]) for key in ("limit", "floor", "waves", "launched")),
                f"{significant(case['launched'] / case['limit'])}x",
            )
            for case in cases
        ],
    )


def _operations(case: Mapping[str, Any]) -> str:
    titles = (
        "operation",
        "launches",
        "GFLOP",
        "MB",
        "floor",
        "waves",
        "launched",
        "blocks, resident",
    )
    long = [row for row in case["rows"] if row["launched"] >= LEAST * case["launched"]]
    short = [row for row in case["rows"] if row not in long]
    keys = "launches", "flops", "bytes", "floor", "waves", "launched"
    others = {key: sum(row[key] for row in short) for key in keys}
    rows = [*long, *([{**others, "operation": f"{len(short)} others"}] if short else [])]
    return table(titles, [_operation(row) for row in [*rows, {**case, "operation": "all"}]])


def _operation(row: Mapping[str, Any]) -> list[str]:
    grids = zip(row.get("blocks", ()), row.get("resident", ()), strict=True)
    return [
        row["operation"].removeprefix("imf_kernels."),
        str(row["launches"]),
        f"{row['flops'] / 1e9:.1f}",
        f"{row['bytes'] / 1e6:.0f}",
        *(_us(row[key]) for key in ("floor", "waves", "launched")),
        "; ".join(f"{blocks}, {resident}" for blocks, resident in grids),
    ]


def _kernels(rows: Sequence[Mapping[str, Any]]) -> str:
    numbers = "forms", "registers", "stack", "shared", "warps"
    titles = "op", "kernel", "", "forms", "registers", "stack, bytes", "shared, bytes", "warps"
    names = "op", "kernel", "architecture"
    return table(titles, [[str(row[key]) for key in (*names, *numbers)] for row in rows])


def _us(us: float) -> str:
    return quantity(us / 1e6) if us else "0"
