"""Whole-solver CUDA graphs: fixed-NFE inference and teacher rollouts, replayed for any request."""

from imf_kernels.graphs.buckets import DEFAULT, PACKED, Bucket, PackedBucket, choose, waste
from imf_kernels.graphs.engine import Stats
from imf_kernels.graphs.sampler import GraphSampler, bake
from imf_kernels.graphs.teacher import GraphTeacher

__all__ = [
    "DEFAULT",
    "PACKED",
    "Bucket",
    "GraphSampler",
    "GraphTeacher",
    "PackedBucket",
    "Stats",
    "bake",
    "choose",
    "waste",
]
