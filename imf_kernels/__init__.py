"""Few-step flow-matching speech: IntMeanFlow distillation, O3S step search, fixed-NFE sampling.

Time 0 is noise and time 1 is data. State, time, grids and dt are float32; a model computes in its
weights' dtype. Values of arguments (times, lengths, ids) are checked on CPU tensors only: reading
CUDA ones would wait for the device. The README has short examples.
"""

from imf_kernels import (
    data,
    distill,
    evaluate,
    export,
    fp8,
    graphs,
    grids,
    guidance,
    metrics,
    models,
    o3s,
    objectives,
    ops,
    profiling,
    sampler,
    solver,
    streaming,
    teacher,
)
from imf_kernels.dispatch import backend, backends
from imf_kernels.objectives import Batch, DSFlow, IntMeanFlow, MeanFlow, SplitMeanFlow
from imf_kernels.teacher import Teacher
from imf_kernels.version import __version__

__all__ = [
    "Batch",
    "DSFlow",
    "IntMeanFlow",
    "MeanFlow",
    "SplitMeanFlow",
    "Teacher",
    "__version__",
    "backend",
    "backends",
    "data",
    "distill",
    "evaluate",
    "export",
    "fp8",
    "graphs",
    "grids",
    "guidance",
    "metrics",
    "models",
    "o3s",
    "objectives",
    "ops",
    "profiling",
    "sampler",
    "solver",
    "streaming",
    "teacher",
]
