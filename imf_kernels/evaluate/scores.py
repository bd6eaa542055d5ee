"""Scoring a folder: every utterance by every metric, nothing twice, nothing lost."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from imf_kernels import checks
from imf_kernels.evaluate.hashes import contents, sha256
from imf_kernels.evaluate.lists import Entry
from imf_kernels.evaluate.scorers import SCORERS, Sample
from imf_kernels.evaluate.workers import Task, run
from imf_kernels.files import replacing
from imf_kernels.metrics.wer import LANGUAGES

SUFFIXES = (".wav", ".flac")
SAVE_EVERY = 10.0
"""Seconds."""

Rows = dict[str, dict[str, Any]]


def evaluate(
    generated: str | os.PathLike[str],
    entries: Sequence[Entry],
    names: Sequence[str],
    *,
    out: str | os.PathLike[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
    language: str = "en",
    device: str = "cpu",
    workers: int = 1,
    allow_missing: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The report of a folder, also written to `out`.

    It holds `metrics` (the `mean` and `count` of each), `utterances` (a row each, in the list's
    order: `name`, the generated file's `sha256`, and `scores` by metric: `value`, what is worth
    keeping beside it, and `of`, hashes of the metric's weights and language and of the text or
    recording that it read) and `missing`.

    What `out` holds already is not computed again while its generated file, its text, the
    recordings, the weights and the language are the same. It is written every ten seconds and when
    an error ends the run, so starting again goes on. Scores of other metrics are kept while the
    generated file is, and the rows of other lists, behind this one's. The means are this list's
    alone, without scores of other texts or recordings than it has now, and without metrics whose
    scores are not all of the same weights and language.

    Args:
        generated: The folder; utterance `name` is `name.wav` or `name.flac`.
        entries: From `read_list`.
        names: Of metrics: keys of `SCORERS`.
        out: A JSON file, in a folder that is there.
        weights: The folder of all networks (`SCORERS` has their names there); None: those of the
            hub, for metrics that have any.
        language: Of the texts: "en" or "zh".
        device: Where networks run; several with commas between them are shared among the workers.
        workers: Processes, each with networks of its own.
        allow_missing: List generated files that are missing, instead of raising.
        progress: Called with what is done and what there is to do, in utterances.

    Raises:
        ValueError: bad arguments; an entry without what a metric needs; an `out` that is no report;
            a score that is not finite.
        FileNotFoundError: missing generated files (how many, and the first of them), recordings or
            weights; no folder for `out`.
        ImportError: a library that a metric needs.
    """
    if not names:
        raise ValueError("metrics: expected at least one, got none")
    names = list(dict.fromkeys(names))
    for name in names:
        checks.choice("metrics", name, tuple(SCORERS))
    checks.choice("language", language, LANGUAGES)
    checks.positive_int("workers", workers)
    out = None if out is None else Path(out)
    if out is not None and not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"out: expected a file in a folder, got {out}")
    files = {entry.name: _generated(Path(generated), entry.name) for entry in entries}
    missing = [name for name, file in files.items() if file is None]
    if missing and not allow_missing:
        raise FileNotFoundError(
            f"generated: expected a .wav or .flac for each of {len(entries)} utterances in "
            f"{generated}, {len(missing)} are missing: {_few(missing)}"
        )
    samples = [Sample(entry, file) for entry in entries if (file := files[entry.name])]
    if not samples:
        raise FileNotFoundError(f"generated: expected at least one file, got none in {generated}")
    _check_needs(samples, names)
    located = {name: SCORERS[name].locate(name, weights) for name in names}
    rows, others = _known(out, samples)
    basis = {name: sha256(name, language, *contents(path))[:16] for name, path in located.items()}
    inputs: list[dict[str, str | None]] = []
    tasks: list[Task] = []
    bases: list[dict[str, str]] = []
    for sample in samples:
        scores = rows[sample.entry.name]["scores"]
        inputs.append({name: _inputs(name, sample.entry) for name in {*names, *scores}})
        wanted = {name: f"{basis[name]} {inputs[-1][name]}" for name in names}
        todo = [name for name in names if scores.get(name, {}).get("of") != wanted[name]]
        for name in todo:  # no mean of what was and what is, should the run end early
            scores.pop(name, None)
        if todo:
            tasks.append((sample, todo))
            bases.append(wanted)

    def report() -> dict[str, Any]:
        return {
            "metrics": _means(rows, inputs),
            "missing": missing,
            "utterances": [*rows.values(), *others],
        }

    saved = time.monotonic()
    results = run(tasks, workers, device.split(","), located, language)
    try:
        if progress is not None:
            progress(len(samples) - len(tasks), len(samples))
        together = zip(tasks, bases, results, strict=True)
        for done, ((sample, _), wanted, scored) in enumerate(together, 1):
            scores = rows[sample.entry.name]["scores"]
            scores.update({name: {**score, "of": wanted[name]} for name, score in scored.items()})
            if progress is not None:
                progress(len(samples) - len(tasks) + done, len(samples))
            if out is not None and time.monotonic() - saved > SAVE_EVERY:
                _write(out, report())
                saved = time.monotonic()
    finally:
        if out is not None:
            _write(out, report())
    return report()


def _generated(folder: Path, name: str) -> Path | None:
    files = (folder / f"{name}{suffix}" for suffix in SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def _check_needs(samples: Sequence[Sample], names: Sequence[str]) -> None:
    """Before anything is computed: every entry has what every metric reads."""
    for name in names:
        for need in SCORERS[name].needs:
            without = [s.entry.name for s in samples if getattr(s.entry, need) is None]
            if without:
                raise ValueError(
                    f"metric {name!r}: expected a list with a {need} for every utterance, "
                    f"{len(without)} have none: {_few(without)}"
                )
            if need == "text":
                continue
            gone = [path for s in samples if not (path := getattr(s.entry, need)).is_file()]
            if gone:
                raise FileNotFoundError(
                    f"metric {name!r}: expected the list's recordings ({need}), "
                    f"{len(gone)} are missing: {_few(gone)}"
                )


def _known(out: Path | None, samples: Sequence[Sample]) -> tuple[Rows, list[Any]]:
    """A row per utterance, with the scores that `out` holds of the same generated file; and the
    rows of other utterances there."""
    old: Rows = {}
    if out is not None and out.exists():
        try:
            report = json.loads(out.read_text(encoding="utf-8"))
            old = {row["name"]: row for row in report["utterances"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"out: expected a report or no file, got {out}: {error}") from error
    rows: Rows = {}
    for sample in samples:
        name, digest = sample.entry.name, sha256(sample.file)
        same = old.get(name, {}).get("sha256") == digest
        rows[name] = {"name": name, "sha256": digest, "scores": old[name]["scores"] if same else {}}
    return rows, [row for name, row in old.items() if name not in rows]


def _inputs(name: str, entry: Entry) -> str | None:
    """The hash of what a metric reads of an entry; None if that is not there, nor the metric."""
    if name not in SCORERS:
        return None
    read = [getattr(entry, need) for need in SCORERS[name].needs]
    if any(part is None or (isinstance(part, Path) and not part.is_file()) for part in read):
        return None
    return sha256(*read)[:16]


def _means(rows: Rows, inputs: Sequence[Mapping[str, str | None]]) -> dict[str, Any]:
    """Of the scores whose inputs are still those, by metric; of one basis each."""
    values: dict[str, dict[str, list[float]]] = {}
    for row, current in zip(rows.values(), inputs, strict=True):
        for name, score in row["scores"].items():
            basis, _, read = score["of"].partition(" ")
            if read == current[name]:
                values.setdefault(name, {}).setdefault(basis, []).append(score["value"])
    return {
        name: {"mean": math.fsum(found) / len(found), "count": len(found)}
        for name, (found, *more) in sorted((name, [*by.values()]) for name, by in values.items())
        if not more
    }


def _write(out: Path, report: Mapping[str, Any]) -> None:
    with replacing(out) as temporary:
        temporary.write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")


def _few(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")
