"""Export a baked student.

python -m imf_kernels.export student.safetensors --to onnx --out student.onnx
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from imf_kernels.export.to_aot_inductor import aot_inductor
from imf_kernels.export.to_onnx import onnx
from imf_kernels.models import Baked

TARGETS = {"onnx": onnx, "pt2": aot_inductor}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    try:
        student = Baked.load(options.student, torch.empty(0, device=options.device).device)
        if not 0 <= options.grid < len(student.grids):
            known = "; ".join(f"{i}: {grid.tolist()}" for i, grid in enumerate(student.grids))
            raise ValueError(f"grid: expected one of {known}; got {options.grid}")
        report = TARGETS[options.to](
            student,
            options.out,
            student.grids[options.grid],
            streaming=options.streaming,
            rows=options.rows,
            frames=options.frames,
        )
    except ImportError as error:
        sys.exit(f"{error}: pip install '.[export]'")
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(str(error))
    print(f"{report.path}: {report.nbytes} bytes, inputs {', '.join(report.inputs)}")
    print(f"relative RMS error against eager {report.relative_rms:.1e}, lengths {report.lengths}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m imf_kernels.export", description=__doc__)
    parser.add_argument("student", help="what Baked.save or GraphSampler.save wrote")
    parser.add_argument("--to", choices=TARGETS, required=True)
    parser.add_argument("--out", required=True, help="the file to write")
    parser.add_argument("--grid", type=int, default=0, help="which of the baked grids")
    parser.add_argument("--rows", type=int, default=8, help="at most; 1: always one")
    parser.add_argument("--frames", type=int, default=4096, help="at most")
    parser.add_argument("--streaming", action="store_true", help="block-causal attention")
    parser.add_argument("--device", default="cpu", help="which a .pt2 is compiled for")
    return parser


if __name__ == "__main__":
    main()
