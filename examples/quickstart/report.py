"""The result of a quickstart run as one self-contained page: numbers, audio, figures."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from examples.quickstart.figures import draw_curves, draw_spectrograms
from imf_kernels.files import replacing

FEW_STEPS = 4  # the best values are sought among rows of at most so many steps


@dataclass(frozen=True, slots=True)
class Column:
    """One metric of the table.

    Attributes:
        key: In a row of the results.
        title: Of the column.
        ideal: The value to be near to.
        digits: After the point.
    """

    key: str
    title: str
    ideal: float
    digits: int


COLUMNS = (
    Column("mcd", "MCD, dB", 0.0, 2),
    Column("frechet", "Fréchet", 0.0, 2),
    Column("sharpness", "sharpness", 1.0, 2),
    Column("c2st", "C2ST", 0.5, 3),
    Column("to_teacher", "to teacher", 0.0, 3),
    Column("seconds_per_audio_second", "s per s of audio", 0.0, 3),
)
MODELS = {
    "teacher": "teacher, guided",
    "teacher_unguided": "teacher, unguided",
    "student": "student",
}
FIGURES = {  # file: caption; one that does not exist is left out
    "spectrograms.png": "One utterance of the test split.",
    "curves.png": "Quality against solver steps, test split.",
    "o3s.png": "The step search (O3S), development split.",
}


@dataclass(frozen=True, slots=True)
class Example:
    """One utterance of the test split, to see and hear.

    Attributes:
        title: The text that is spoken, perhaps with its speaker.
        mels: Label to `(N, 80)` normalised log-mel, in the order of display.
        wavs: Label to an existing WAV file, in the order of display.
        prompt_frames: How many leading frames were given, not generated.
    """

    title: str
    mels: dict[str, Tensor]
    wavs: dict[str, Path]
    prompt_frames: int = 0


def write_report(out: Path, results: Mapping[str, Any], examples: Sequence[Example]) -> Path:
    """Write `spectrograms.png`, `curves.png` and `report.html` into the folder `out`.

    Args:
        out: An existing folder; an `o3s.png` in it is embedded too.
        results: "rows" (one mapping per model, grid and step count with the metrics of
            `COLUMNS`; None or absent where one has no meaning), and anything else, shown as it is.
        examples: At least one; the first is drawn, all can be played.

    Returns:
        The page's path. It holds all its images and sounds and links to nothing.
    """
    if not examples:
        raise ValueError("examples must hold at least one Example, got none")
    rows = results["rows"]
    first = examples[0]
    draw_spectrograms(out / "spectrograms.png", first.title, first.mels, first.prompt_frames)
    draw_curves(out / "curves.png", rows)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["scalar"] = _scalar
    page = environment.get_template("report.html.j2").render(
        columns=COLUMNS,
        table=_table(rows),
        few_steps=FEW_STEPS,
        examples=[
            (example.title, {label: _data_uri(wav) for label, wav in example.wavs.items()})
            for example in examples
        ],
        figures={
            caption: _data_uri(out / name)
            for name, caption in FIGURES.items()
            if (out / name).exists()
        },
        details={key: value for key, value in results.items() if key != "rows"},
    )
    path = out / "report.html"
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows for display: model, nfe, grid, and per column its text and whether it is the best."""
    best = {column: _best_distance(rows, column) for column in COLUMNS}
    return [
        {
            "model": MODELS.get(row["model"], row["model"]),
            "nfe": row["nfe"],
            "grid": row["grid"],
            "cells": [
                {
                    "text": _number(row.get(column.key), column.digits),
                    "best": row["nfe"] <= FEW_STEPS and _distance(row, column) <= best[column],
                }
                for column in COLUMNS
            ],
        }
        for row in rows
    ]


def _best_distance(rows: Sequence[Mapping[str, Any]], column: Column) -> float:
    distances = [_distance(row, column) for row in rows if row["nfe"] <= FEW_STEPS]
    finite = [distance for distance in distances if math.isfinite(distance)]
    return min(finite, default=-math.inf)


def _distance(row: Mapping[str, Any], column: Column) -> float:
    """How far from the ideal, at the precision that is shown; infinite where there is no value."""
    value = row.get(column.key)
    if value is None or not math.isfinite(value):
        return math.inf
    return abs(round(value, column.digits) - column.ideal)


def _number(value: float | None, digits: int) -> str:
    return "n/a" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _scalar(value: object) -> str:
    """A leaf of the results as text."""
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value, default=str)


def _data_uri(path: Path) -> str:
    mime = {".png": "image/png", ".wav": "audio/wav"}[path.suffix]
    return f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"
