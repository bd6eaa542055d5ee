"""A student's whole solve in one file that needs none of its Python: AOTInductor's .pt2 or ONNX."""

from imf_kernels.export.program import Exportable, Solve, program
from imf_kernels.export.report import Report
from imf_kernels.export.to_aot_inductor import aot_inductor
from imf_kernels.export.to_onnx import onnx

__all__ = ["Exportable", "Report", "Solve", "aot_inductor", "onnx", "program"]
