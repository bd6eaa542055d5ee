"""What a call launches, and what each of its operations takes beside its floor."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.operations import Recording
from benchmarks.timing import Ceilings, Run, synchronize
from benchmarks.workload import limit

CALLS = 5


def launches(run: Run, device: torch.device, most: int = 12) -> dict[str, Any]:
    """Kernels by the profiler, most telling first; on the CPU, which has none, operations.

    All are means over `CALLS` calls.
    """
    trace = _profiled(run, device)
    cuda = device.type == "cuda"
    kind, total = DeviceType.CPU, "self_cpu_time_total"
    if cuda:
        kind, total = DeviceType.CUDA, "self_device_time_total"
    averages = trace.key_averages()
    entries = [e for e in averages if e.device_type == kind and not e.is_user_annotation]
    launched = [e for e in entries if not e.key.startswith(("Memcpy", "Memset"))]
    if not launched:
        raise RuntimeError("the profiler saw no kernel")
    launched.sort(key=lambda entry: getattr(entry, total), reverse=True)
    us = sum(getattr(entry, total) for entry in entries)
    top = [
        {
            "name": e.key,
            "count": e.count / CALLS,
            "us": getattr(e, total) / CALLS,
            "share": getattr(e, total) / us,
        }
        for e in launched[:most]
    ]
    count, every = (sum(e.count for e in those) for those in (launched, entries))
    means = {"count": count / CALLS, "copies": (every - count) / CALLS, "us": us / CALLS}
    return {**means, "top": top}


def by_operation(run: Run, device: torch.device, ceilings: Ceilings) -> list[dict[str, Any]]:
    """Every operator of a call, the longest first: calls, microseconds on the device, and its floor
    (`benchmarks.operations`, all bytes from memory)."""
    with Recording() as seen:
        run()
    found: dict[str, dict[str, Any]] = {}
    for each in seen.operations:
        if not each.nbytes:
            continue  # it asks about dtypes
        row = {"name": each.name, "count": 0, "us": 0.0, "floor": 0.0}
        row = found.setdefault(each.name.replace(".", "::"), row)
        row["count"] += 1
        row["floor"] += 1e6 * limit(each.flops, each.nbytes, ceilings)
    for event in _profiled(run, device).events():
        if event.name in found and not _within(event, found):
            took = event.device_time_total if device.type == "cuda" else event.cpu_time_total
            found[event.name]["us"] += took / CALLS
    return sorted(found.values(), key=lambda row: row["us"], reverse=True)


def _within(event: Any, names: Container[str]) -> bool:
    """Whether an event is inside one of these."""
    outer = event.cpu_parent
    while outer is not None and outer.name not in names:
        outer = outer.cpu_parent
    return outer is not None


def _profiled(run: Run, device: torch.device) -> Any:
    """A trace of `CALLS` calls, after one to warm up."""
    run()
    synchronize(device)
    cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *cuda]) as trace:
        for _ in range(CALLS):
            run()
        synchronize(device)
    return trace
