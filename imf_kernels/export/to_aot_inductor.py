"""AOTInductor: compiled for one device and its kind of processor, run by libtorch alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from imf_kernels.export.destination import destination
from imf_kernels.export.program import Exportable, Student, subject_of, trace
from imf_kernels.export.report import Report, checked


def aot_inductor(
    student: Student | Exportable,
    path: str | Path,
    grid: str | Tensor | Sequence[float] | None = None,
    nfe: int | None = None,
    *,
    streaming: bool = False,
    rows: int = 8,
    frames: int = 4096,
    bound: float | None = None,
) -> Report:
    """Compile the whole solve for the student's device into a package, and check it there.

    Args:
        path: A file ending in `.pt2`, written only if the check passes.
        rows, frames: See `program`.
        bound: The error that is allowed; None: 1e-4 in float32, .05 in half precision.

    Raises:
        ValueError, TypeError: another ending, what cannot be exported; see `Solve`.
        FileNotFoundError: no such directory.
        RuntimeError: no C++ compiler, or an error beyond the bound.
    """
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    subject = subject_of(student, grid, nfe, streaming=streaming)
    with destination(path, ".pt2") as file:
        metadata = {"inputs": " ".join(subject.dims), "output": subject.output}
        made = trace(subject, rows, frames)
        with torch.no_grad():
            aoti_compile_and_package(
                made,
                package_path=str(file),
                inductor_configs={"aot_inductor.metadata": metadata},
            )
        run = aoti_load_package(str(file))
        report = checked(file, subject, lambda inputs: run(*inputs), rows, frames, bound)
    return report._replace(path=Path(path))
