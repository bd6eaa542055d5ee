"""Fused operations: one file each with contract, reference, Triton kernel, launcher, autograd."""

from imf_kernels.ops.gated_residual import gated_residual
from imf_kernels.ops.guided_euler_step import EulerStep, guided_euler_step
from imf_kernels.ops.mean_velocity_loss import mean_velocity_loss
from imf_kernels.ops.modulated_layer_norm import modulated_layer_norm
from imf_kernels.ops.ragged_copy import Copy, ragged_copy

__all__ = [
    "Copy",
    "EulerStep",
    "gated_residual",
    "guided_euler_step",
    "mean_velocity_loss",
    "modulated_layer_norm",
    "ragged_copy",
]
