"""Fused operations: one file each with contract, reference, Triton kernel, launcher, autograd."""

from imf_kernels.ops.attention import attention
from imf_kernels.ops.cached_attention import cached_attention
from imf_kernels.ops.causal_conv import causal_conv, causal_conv_norm
from imf_kernels.ops.depthwise_conv import depthwise_conv_norm
from imf_kernels.ops.fp8_linear import fp8_linear
from imf_kernels.ops.grn_gelu import grn_gelu
from imf_kernels.ops.grouped_conv import grouped_conv_mish
from imf_kernels.ops.guided_euler_step import EulerStep, guided_euler_step
from imf_kernels.ops.linear import linear
from imf_kernels.ops.mean_velocity_loss import mean_velocity_loss
from imf_kernels.ops.modulated_layer_norm import (
    gated_residual_norm,
    gated_residual_norm_fp8,
    modulated_layer_norm,
    modulated_layer_norm_fp8,
    residual_layer_norm,
)
from imf_kernels.ops.quantize_rows import Quantized, quantize_rows
from imf_kernels.ops.ragged_copy import Copy, ragged_copy
from imf_kernels.ops.rope_qkv import rope_qkv

__all__ = [
    "Copy",
    "EulerStep",
    "Quantized",
    "attention",
    "cached_attention",
    "causal_conv",
    "causal_conv_norm",
    "depthwise_conv_norm",
    "fp8_linear",
    "gated_residual_norm",
    "gated_residual_norm_fp8",
    "grn_gelu",
    "grouped_conv_mish",
    "guided_euler_step",
    "linear",
    "mean_velocity_loss",
    "modulated_layer_norm",
    "modulated_layer_norm_fp8",
    "quantize_rows",
    "ragged_copy",
    "residual_layer_norm",
    "rope_qkv",
]
