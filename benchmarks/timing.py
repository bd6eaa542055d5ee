"""Timing of several contenders side by side, and what the device could do at best."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Run = Callable[[], Any]
Clock = Callable[[Run, torch.device], float]

SPAN = 2.0
"""Milliseconds that a measurement on the device lasts at least."""


class Times(NamedTuple):
    """Milliseconds: median, and the quantiles 10 and 90 %."""

    median: float
    low: float
    high: float


def milliseconds(run: Run, device: torch.device) -> float:
    """From the call until the device has its result: the latency that a caller sees."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def turns(
    contenders: Mapping[str, Run],
    device: torch.device,
    rounds: Iterable[int],
    clock: Clock = milliseconds,
) -> dict[str, list[float]]:
    """Milliseconds of each contender in every round: in turn, so that drift of the machine meets
    all alike. They have run before."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in rounds:
        for name, run in contenders.items():
            taken[name].append(clock(run, device))
    return taken


def interleaved(
    contenders: Mapping[str, Run], device: torch.device, rounds: int, warm_ups: int = 3
) -> dict[str, Times]:
    """Contenders in turn, after warm-ups."""
    for run in contenders.values():
        for _ in range(warm_ups):
            run()
    return {name: summary(ms) for name, ms in turns(contenders, device, range(rounds)).items()}


def turns_on_device(
    contenders: Mapping[str, Run], device: torch.device, rounds: Iterable[int]
) -> dict[str, list[float]]:
    """What each contender takes of the device alone, in turn: for graphs and single kernels.

    A contender is repeated without a pause for `SPAN` or longer. The CPU, which has no such thing
    as launches, is timed by `turns`.
    """
    if device.type != "cuda":
        return turns(contenders, device, rounds)
    repeats, chains = {}, {}
    for name, run in contenders.items():
        repeats[name] = math.ceil(SPAN / max(device_milliseconds(run, device), 1e-3))
        chains[name] = functools.partial(_repeat, run, repeats[name])
        chains[name]()
    taken = turns(chains, device, rounds, device_milliseconds)
    return {name: [ms / repeats[name] for ms in taken[name]] for name in taken}


def device_milliseconds(run: Run, device: torch.device) -> float:
    """Between two events of the device, with nothing of use in its L2 cache.

    Reads of a buffer larger than the cache come first: they evict, leave nothing to be written
    back, and keep the device busy while `run` is launched.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(4):
        _buffer(device).sum()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@functools.cache
def _buffer(device: torch.device) -> Tensor:
    return torch.zeros(max(2**26, l2_bytes(device)), device=device)  # float32: 4 caches or more


def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def _repeat(run: Run, times: int) -> None:
    for _ in range(times):
        run()


def graphed(run: Run, device: torch.device, warm_ups: int = 3) -> Run:
    """`run` captured in a CUDA graph after warm-ups; on the CPU `run` itself.

    A replay returns the captured call's result, which it has overwritten.
    """
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(values: list[float]) -> Times:
    if len(values) < 2:
        return Times(*(3 * values[:1]))
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Times(statistics.median(values), deciles[0], deciles[-1])


class Ceilings(NamedTuple):
    """Measured: FLOP a second of a large product, bytes a second of a large copy, both ways."""

    flops: float
    bandwidth: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Ceilings:
        n = 8192 if device.type == "cuda" else 1024
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        source = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
        target = torch.empty_like(source)
        runs: dict[str, Run] = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
        for run in runs.values():
            run()
        taken = turns_on_device(runs, device, range(10))
        ms = {name: statistics.median(values) for name, values in taken.items()}
        return cls(2e3 * n**3 / ms["product"], 2e3 * source.nbytes / ms["copy"])
