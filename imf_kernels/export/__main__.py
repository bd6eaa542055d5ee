"""Export a student.

python -m imf_kernels.export student.safetensors --to onnx --out student.onnx
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from imf_kernels.export.program import Student
from imf_kernels.export.to_aot_inductor import aot_inductor
from imf_kernels.export.to_onnx import onnx
from imf_kernels.models import Baked, load_student
from imf_kernels.models.students import side_file

TARGETS = {"onnx": onnx, "pt2": aot_inductor}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    try:
        student, grids = _load(options.student, options.device)
        if not 0 <= options.grid < len(grids):
            known = "; ".join(f"{i}: {grid.tolist()}" for i, grid in enumerate(grids))
            raise ValueError(f"grid: expected one of {known}; got {options.grid}")
        report = TARGETS[options.to](
            student,
            options.out,
            grids[options.grid],
            streaming=options.streaming,
            rows=options.rows,
            frames=options.frames,
            bound=options.bound,
        )
    except ImportError as error:
        sys.exit(f"{error}: pip install '.[export]'")
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(str(error))
    print(f"{report.path}: {report.nbytes} bytes, inputs {', '.join(report.inputs)}")
    print(f"relative RMS error against eager {report.relative_rms:.1e}, lengths {report.lengths}")


def _load(path: str, device: str) -> tuple[Student, list[Tensor]]:
    """A student, and the grids that are saved with it."""
    if Path(path).suffix != ".pt" and not Path(side_file(path)).exists():
        baked = Baked.load(path, device)
        return baked, list(baked.grids)
    student = load_student(path, device)
    if student.grid is None:
        raise ValueError(f"student: expected one that was saved with a grid, got none: {path}")
    return student.model, [student.grid]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m imf_kernels.export", description=__doc__)
    parser.add_argument("student", help="what Baked.save, GraphSampler.save or save_student wrote")
    parser.add_argument("--to", choices=TARGETS, required=True)
    parser.add_argument("--out", required=True, help="the file to write")
    parser.add_argument("--grid", type=int, default=0, help="which of the saved grids")
    parser.add_argument("--rows", type=int, default=8, help="at most; 1: always one")
    parser.add_argument("--frames", type=int, default=4096, help="at most, 30 or more")
    parser.add_argument("--streaming", action="store_true", help="block-causal attention")
    parser.add_argument("--bound", type=float, help="greatest error; 1e-4, .05 in half precision")
    parser.add_argument("--device", default="cpu", help="which a .pt2 is compiled for")
    return parser


if __name__ == "__main__":
    main()
