"""What a call launches."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import Run, synchronize

CALLS = 5


def launches(run: Run, device: torch.device, most: int = 12) -> dict[str, Any]:
    """Kernels by the profiler, most telling first; on the CPU, which has none, operations.

    All are means over `CALLS` calls.
    """
    run()
    synchronize(device)
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as trace:
        for _ in range(CALLS):
            run()
        synchronize(device)
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
