"""Scoring in this process or in several, each with networks of its own."""

from __future__ import annotations

import functools
import math
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from imf_kernels.evaluate.scorers import SCORERS, Sample, Score

Task = tuple[Sample, list[str]]
"""An utterance, and the metrics that it lacks."""
Scores = dict[str, dict[str, Any]]


def run(
    tasks: Sequence[Task],
    workers: int,
    devices: Sequence[str],
    located: Mapping[str, str],
    language: str,
) -> Iterator[Scores]:
    """Each task's scores, in order; `located` holds the metrics' weights."""
    if workers == 1 or len(tasks) < 2:
        worker = _Worker(devices[0], located, language)
        yield from map(worker, tasks)
        return
    context = multiprocessing.get_context("spawn")
    shared = context.Queue()
    for index in range(workers):
        shared.put(devices[index % len(devices)])
    threads = max(torch.get_num_threads() // workers, 1)
    arguments = (shared, dict(located), language, threads)
    with ProcessPoolExecutor(workers, context, _start, arguments) as pool:
        try:
            yield from pool.map(_score, tasks)
        finally:
            pool.shutdown(cancel_futures=True)


class _Worker:
    """Metrics are loaded when they are first asked for, so that an error is the task's."""

    def __init__(self, device: str, located: Mapping[str, str], language: str) -> None:
        def load(name: str) -> Score:
            return SCORERS[name].load(located[name], language, device)

        self.load = functools.cache(load)

    def __call__(self, task: Task) -> Scores:
        sample, names = task
        return {name: self.score(name, sample) for name in names}

    def score(self, name: str, sample: Sample) -> dict[str, Any]:
        score = self.load(name)
        try:
            scored = score(sample)
        except ValueError as error:
            raise ValueError(f"metric {name!r} of {sample.file}: {error}") from error
        if not math.isfinite(scored["value"]):
            raise ValueError(
                f"metric {name!r} of {sample.file}: expected a finite score, got {scored['value']}"
            )
        return scored


_worker: _Worker | None = None
"""That of a process of the pool."""


def _start(devices: Any, located: Mapping[str, str], language: str, threads: int) -> None:
    global _worker
    torch.set_num_threads(threads)
    _worker = _Worker(devices.get(), located, language)


def _score(task: Task) -> Scores:
    assert _worker is not None
    return _worker(task)
