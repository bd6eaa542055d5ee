"""Scoring a folder: every utterance by every metric, nothing twice, nothing lost."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from imf_kernels import checks
from imf_kernels.evaluate.lists import Entry
from imf_kernels.evaluate.scorers import SCORERS, Sample, Score
from imf_kernels.files import replacing
from imf_kernels.metrics.wer import LANGUAGES
from imf_kernels.models.checkpoints import HUB

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
    keeping beside it, and `of`, a hash of what else it was computed from) and `missing`.

    What `out` holds already is not computed again while its generated file, its text, the
    recordings, the weights and the language are the same. Scores of other metrics are kept while
    the generated file is. It is written every ten seconds and when an error ends the run, so
    starting again goes on.

    Args:
        generated: The folder; utterance `name` is `name.wav` or `name.flac`.
        entries: From `read_list`.
        names: Of metrics: keys of `SCORERS`.
        out: A JSON file.
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
            weights.
        ImportError: a library that a metric needs.
    """
    if not names:
        raise ValueError("metrics: expected at least one, got none")
    for name in names:
        checks.choice("metrics", name, tuple(SCORERS))
    checks.choice("language", language, LANGUAGES)
    checks.positive_int("workers", workers)
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
    rows = _known(None if out is None else Path(out), samples)
    basis = {name: _sha256(name, language, *_contents(path)) for name, path in located.items()}
    tasks = []
    for sample in samples:
        scores = rows[sample.entry.name]["scores"]
        wanted = {name: _basis(basis[name], sample, name) for name in names}
        todo = [name for name in names if scores.get(name, {}).get("of") != wanted[name]]
        if todo:
            tasks.append((sample, todo, wanted))

    saved = time.monotonic()
    results = _run(tasks, workers, device.split(","), located, language)
    try:
        if progress is not None:
            progress(len(samples) - len(tasks), len(samples))
        for done, ((sample, _, wanted), scored) in enumerate(zip(tasks, results, strict=True), 1):
            scores = rows[sample.entry.name]["scores"]
            scores.update({name: {**score, "of": wanted[name]} for name, score in scored.items()})
            if progress is not None:
                progress(len(samples) - len(tasks) + done, len(samples))
            if out is not None and time.monotonic() - saved > SAVE_EVERY:
                _write(Path(out), _report(rows, missing))
                saved = time.monotonic()
    finally:
        report = _report(rows, missing)
        if out is not None:
            _write(Path(out), report)
    return report


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


def _known(out: Path | None, samples: Sequence[Sample]) -> Rows:
    """A row per utterance, with the scores that `out` holds of the same generated file."""
    old: Rows = {}
    if out is not None and out.exists():
        try:
            old = {row["name"]: row for row in json.loads(out.read_text())["utterances"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"out: expected a report or no file, got {out}: {error}") from error
    rows: Rows = {}
    for sample in samples:
        name, sha256 = sample.entry.name, _sha256(sample.file)
        same = old.get(name, {}).get("sha256") == sha256
        rows[name] = {"name": name, "sha256": sha256, "scores": old[name]["scores"] if same else {}}
    return rows


def _basis(metric: str, sample: Sample, name: str) -> str:
    """The hash of all that a score depends on but the generated file."""
    return _sha256(metric, *(getattr(sample.entry, need) for need in SCORERS[name].needs))[:16]


def _contents(weights: str) -> list[str | Path]:
    """What a metric's weights are told apart by: their files, or their name on the hub."""
    path = Path(weights)
    if not weights or weights.startswith(HUB):
        return [weights]
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return list(itertools.chain.from_iterable((str(f.relative_to(path)), f) for f in files))


def _sha256(*parts: str | Path) -> str:
    """Of strings and of files' contents; a single file's is the usual one."""
    if len(parts) == 1 and isinstance(parts[0], Path):
        with parts[0].open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    whole = [_sha256(part) if isinstance(part, Path) else part for part in parts]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


Task = tuple[Sample, list[str], Mapping[str, str]]


def _run(
    tasks: Sequence[Task],
    workers: int,
    devices: Sequence[str],
    located: Mapping[str, str],
    language: str,
) -> Iterator[dict[str, dict[str, Any]]]:
    """Each task's scores, in order."""
    if workers == 1 or len(tasks) < 2:
        worker = _Worker(devices[0], located, language)
        yield from (worker(sample, todo) for sample, todo, _ in tasks)
        return
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for worker_index in range(workers):
        queue.put(devices[worker_index % len(devices)])
    threads = max(torch.get_num_threads() // workers, 1)
    arguments = (queue, dict(located), language, threads)
    with ProcessPoolExecutor(workers, context, _start, arguments) as pool:
        try:
            yield from pool.map(_score, *zip(*((s, todo) for s, todo, _ in tasks), strict=True))
        finally:
            pool.shutdown(cancel_futures=True)


class _Worker:
    """Loads a metric when it is first asked for, so that its error is an utterance's."""

    def __init__(self, device: str, located: Mapping[str, str], language: str) -> None:
        def load(name: str) -> Score:
            return SCORERS[name].load(located[name], language, device)

        self.load = functools.cache(load)

    def __call__(self, sample: Sample, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        scores = {}
        for name in names:
            scores[name] = self.load(name)(sample)
            if not math.isfinite(scores[name]["value"]):
                raise ValueError(
                    f"metric {name!r}: expected a finite score of {sample.file}, "
                    f"got {scores[name]['value']}"
                )
        return scores


_worker: _Worker | None = None
"""In a process of the pool: its networks."""


def _start(devices: Any, located: Mapping[str, str], language: str, threads: int) -> None:
    global _worker
    torch.set_num_threads(threads)
    _worker = _Worker(devices.get(), located, language)


def _score(sample: Sample, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    assert _worker is not None
    return _worker(sample, names)


def _report(rows: Rows, missing: Sequence[str]) -> dict[str, Any]:
    values: dict[str, list[float]] = {}
    for row in rows.values():
        for name, score in row["scores"].items():
            values.setdefault(name, []).append(score["value"])
    return {
        "metrics": {
            name: {"mean": math.fsum(values[name]) / len(values[name]), "count": len(values[name])}
            for name in sorted(values)
        },
        "missing": list(missing),
        "utterances": list(rows.values()),
    }


def _write(out: Path, report: Mapping[str, Any]) -> None:
    with replacing(out) as temporary:
        temporary.write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")


def _few(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")
