"""Timing of several contenders side by side, and what the device could do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch


class Times(NamedTuple):
    """Milliseconds: median, and the quantiles 10 and 90 %."""

    median: float
    low: float
    high: float


def interleaved(
    contenders: Mapping[str, Callable[[], Any]],
    device: torch.device,
    rounds: int,
    warm_ups: int = 3,
) -> dict[str, Times]:
    """Time each contender once per round, in turn, so that drift of the machine meets all alike."""
    for run in contenders.values():
        for _ in range(warm_ups):
            run()
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            taken[name].append(milliseconds(run, device))
    return {name: _summary(values) for name, values in taken.items()}


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """From the call until the device has its result: the latency that a caller sees."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(values: list[float]) -> Times:
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
        n = 8192 if device.type == "cuda" else 512
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        source = torch.empty(2**28 if device.type == "cuda" else 2**22, device=device)
        target = torch.empty_like(source)
        times = interleaved(
            {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, device, rounds=10
        )
        return cls(
            2 * n**3 / times["product"].median * 1e3,
            2 * source.nbytes / times["copy"].median * 1e3,
        )
