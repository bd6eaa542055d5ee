"""Latency of requests of mixed lengths from many threads.

    ours, graph     GraphSampler, as many slots as threads, 4 at most; `prepare` in its graph
    ours, eager     sampler.sample, one at a time behind a lock
    plain           plain PyTorch, one at a time behind a lock

From a thread's call until the device has its result, waiting included. A round is a burst of all
requests, and its datum their median: they wait for each other, so they are no data of their own.
"p50" and "p99" are those of all requests of all rounds, "requests_a_second" is that of a burst.
Contenders' bursts take turns.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.contest import Conditions, Contest, Row, Unavailable
from benchmarks.plain import plain, plainly
from benchmarks.timing import synchronize
from benchmarks.workload import allowed, build, error, request
from imf_kernels import sampler
from imf_kernels.graphs import GraphSampler

Solve = Callable[[Tensor, dict[str, Tensor]], Tensor]
"""Of a request's noise and conditions."""


def rows(conditions: Conditions) -> list[Row]:
    def row(threads: int, **told: Any) -> Row:
        shape = {"model": "f5_base", "nfe": 3, "threads": threads, "requests": 64}
        return conditions.row(**shape | {"shortest": 1.0, "longest": 10.0} | told)

    if conditions.tiny:
        return [row(2, model="tiny", requests=4, shortest=0.1, longest=0.2)]
    if conditions.selection == "cpu":
        cut = {"depth": 2, "requests": 16, "shortest": 0.3, "longest": 1.0}
        return [row(threads, **cut) for threads in (1, 4, 16)]
    return [row(threads) for threads in (1, 4, 16)]


@pytest.mark.rows(of=rows)
def test_latency(row: Row, contest: Contest) -> None:
    conditions, device = contest.conditions, contest.device
    single = conditions.dtype == torch.float32
    model, rate = build(row["model"], device, conditions.dtype, row.get("depth"))
    twin = plain(model, masked=False)
    exact = twin if single else plain(model, masked=False).float()
    draw, asked = random.Random(0), []
    for _ in range(row["requests"]):
        frames = round(draw.uniform(row["shortest"], row["longest"]) * rate)
        asked.append(request(model, 1, frames, frames // 3))
    truths = [plainly(solver(exact, row["nfe"]))(*each) for each in asked]

    def farthest(mels: Iterable[Tensor]) -> float:
        return max(
            error(mel - noise, truth - noise)
            for mel, truth, (noise, _) in zip(mels, truths, asked, strict=True)
        )

    def own_stream() -> None:
        if conditions.cuda:
            torch.cuda.set_stream(torch.cuda.Stream(device))

    bound = 1e-4
    if not single:
        bound = allowed(farthest(plainly(solver(twin, row["nfe"]))(*each) for each in asked))
    lock = threading.Lock()

    def locked(solve: Solve) -> Solve:
        def one(noise: Tensor, given: dict[str, Tensor]) -> Tensor:
            with lock:
                mel = solve(noise, given)
                synchronize(device)
                return mel

        return one

    with contextlib.ExitStack() as stack:

        def graph() -> Solve:
            if not (conditions.cuda or conditions.tiny):
                raise Unavailable("a CUDA graph needs CUDA")
            slots = min(row["threads"], 4)
            found = stack.enter_context(GraphSampler(model, row["nfe"], slots=slots))

            def one(noise: Tensor, given: dict[str, Tensor]) -> Tensor:
                mel = found.sample(noise, conditions=given)
                if conditions.cuda:
                    torch.cuda.current_stream(device).synchronize()
                return mel

            return one

        made: dict[str, tuple[str, Callable[[], Solve]]] = {
            "ours, graph": ("ours", graph),
            "ours, eager": ("ours", lambda: locked(solver(model, row["nfe"]))),
            "plain": ("baseline", lambda: locked(plainly(solver(twin, row["nfe"])))),
        }
        pool = stack.enter_context(ThreadPoolExecutor(row["threads"], initializer=own_stream))
        for name, (role, make) in made.items():
            contest.enter(
                name,
                lambda make=make: functools.partial(burst, pool, make(), asked),
                lambda answers: (farthest(mel for _, mel in answers), bound),
                role=role,
            )
        contest.settle()
        taken: dict[str, list[list[float]]] = {name: [] for name in contest.contenders}
        rates: dict[str, list[float]] = {name: [] for name in contest.contenders}
        for _ in contest.rounds():
            for name, contender in contest.contenders.items():
                start = time.perf_counter()
                taken[name].append([seconds for seconds, _ in contender.run()])
                rates[name].append(len(asked) / (time.perf_counter() - start))
        for name, bursts in taken.items():
            percentiles = statistics.quantiles(itertools.chain(*bursts), n=100, method="inclusive")
            contest.tell(
                name,
                p50=percentiles[49],
                p99=percentiles[98],
                requests_a_second=statistics.median(rates[name]),
            )
            contest.record(name, [statistics.median(seconds) for seconds in bursts])


def solver(model: Any, nfe: int) -> Solve:
    return lambda noise, given: sampler.sample(model, noise, model.prepare(**given), nfe=nfe)


def burst(pool: Executor, solve: Solve, asked: list[Any]) -> list[tuple[float, Tensor]]:
    """Seconds and mel of every request, answered by as many threads as there are."""

    def one(each: Any) -> tuple[float, Tensor]:
        start = time.perf_counter()
        mel = solve(*each)
        return time.perf_counter() - start, mel

    return list(pool.map(one, asked))
