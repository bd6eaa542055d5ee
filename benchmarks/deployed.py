"""The ways to run a deployed student, each with no imports but its own.

    python -m benchmarks.deployed onnxruntime student.onnx inputs.npz 2

solves once, on so many threads, and prints the most bytes that the process has held.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

Solve = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""The file's inputs by name, in its order, to the mel."""


def ours(file: str, threads: int) -> Solve:
    import torch

    from imf_kernels.graphs import GraphSampler
    from imf_kernels.models import Baked

    torch.set_num_threads(threads)
    service = GraphSampler(Baked.load(file))

    def solve(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        given = {name: torch.from_numpy(value) for name, value in inputs.items()}
        return service.sample(given.pop("noise"), conditions=given).numpy()

    return solve


def aot_inductor(file: str, threads: int) -> Solve:
    import torch
    from torch._inductor import aoti_load_package

    torch.set_num_threads(threads)
    run = aoti_load_package(file)
    return lambda inputs: run(*map(torch.from_numpy, inputs.values())).numpy()


def onnxruntime(file: str, threads: int) -> Solve:
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = threads
    # its idle threads would take the cores from whoever has the next turn
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, dict(inputs))[0]


RUNTIMES: dict[str, Callable[[str, int], Solve]] = {
    "ours": ours,
    "AOTInductor": aot_inductor,
    "onnxruntime": onnxruntime,
}


def peak_bytes() -> int:
    """Of this process; `getrusage` would begin with what its parent held."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError("/proc/self/status: expected the line VmHWM, as Linux has it")
    return 1024 * int(found[1])


if __name__ == "__main__":
    name, file, inputs, threads = sys.argv[1:]
    RUNTIMES[name](file, int(threads))(dict(np.load(inputs)))
    print(peak_bytes())
