"""ONNX: for onnxruntime, TensorRT and whatever else reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imf_kernels.export.destination import destination
from imf_kernels.export.program import Exportable, Student, free_dims, subject_of, trace
from imf_kernels.export.report import Report, checked

LARGEST = 2**31
"""Bytes of a protobuf message, in which weights lie."""


def onnx(
    student: Student | Exportable,
    path: str | Path,
    grid: str | Tensor | Sequence[float] | None = None,
    nfe: int | None = None,
    *,
    streaming: bool = False,
    rows: int = 8,
    frames: int = 4096,
    opset: int = 20,
    bound: float | None = None,
) -> Report:
    """Write the whole solve as one ONNX file, and check it with onnxruntime on the CPU.

    Args:
        path: A file ending in `.onnx`, written only if the check passes.
        rows, frames: See `program`.
        opset: ONNX's operators by version.
        bound: The relative RMS error that is allowed; None: 1e-4.

    Raises:
        ValueError, TypeError: another ending; weights that are not float32, or of more than 2 GiB;
            what cannot be exported; see `Solve`.
        FileNotFoundError: no such directory.
        RuntimeError: an error beyond the bound.
    """
    from onnxruntime import InferenceSession

    subject = subject_of(student, grid, nfe, streaming=streaming)
    if subject.dtype != torch.float32:
        raise ValueError(
            "student: expected float32 weights, which ONNX's tools cast as the device wants them, "
            f"got {subject.dtype}; a .pt2 takes these"
        )
    nbytes = sum(tensor.nbytes for tensor in subject.state_dict().values())
    if nbytes >= LARGEST:
        raise ValueError(
            f"student: expected less than 2 GiB of weights, got {nbytes} bytes; a .pt2 takes them"
        )
    names = list(subject.dims)
    with destination(path, ".onnx") as file:
        made: Any = torch.onnx.export(
            as_onnx_takes_it(trace(subject, rows, frames)),
            dynamo=True,
            opset_version=opset,
            input_names=names,
            output_names=[subject.output],
            dynamic_shapes=(tuple(free_dims(subject, rows, frames)),),
            verbose=False,
        )
        made.save(str(file))
        session = InferenceSession(str(file), providers=["CPUExecutionProvider"])

        def run(inputs: Sequence[Tensor]) -> Tensor:
            given = {name: x.cpu().numpy() for name, x in zip(names, inputs, strict=True)}
            return torch.from_numpy(session.run(None, given)[0])

        report = checked(file, subject, run, rows, frames, bound)
    return report._replace(path=Path(path))


def as_onnx_takes_it(program: Any) -> Any:
    """With attention in plain products, which onnxruntime is faster at than at what the exporter
    makes of it, and indices of int64: what indexing becomes (GatherND, ScatterND) takes no int32.
    """
    aten = torch.ops.aten

    def narrow(at: Tensor | None) -> bool:
        return at is not None and at.dtype == torch.int32

    def gathered(x: Tensor, places: Sequence[Tensor | None]) -> Any:
        if not any(map(narrow, places)):
            return NotImplemented
        wide = [at.long() if at is not None and narrow(at) else at for at in places]
        return aten.index.Tensor(x, wide)

    def added(x: Tensor, dim: int, at: Tensor, source: Tensor) -> Any:
        return aten.index_add(x, dim, at.long(), source) if narrow(at) else NotImplemented

    def attended(q: Tensor, k: Tensor, v: Tensor, sees: Tensor, *, scale: float) -> Tensor:
        scores = (scale * q @ k.mT).masked_fill(~sees, -torch.inf)
        return scores.softmax(-1) @ v

    return program.run_decompositions(
        {
            aten.index.Tensor: gathered,
            aten.index_add.default: added,
            aten.scaled_dot_product_attention.default: attended,
        }
    )
