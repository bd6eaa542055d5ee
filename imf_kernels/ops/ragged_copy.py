"""Many copies between ragged and padded tensors in one launch.

Static buffers hold a bucket of rows and frames, requests come in other sizes: each copy takes what
both sides have of their first two dimensions and pads the rest of the destination. On CUDA, with
the C++ extension, the descriptors of all copies travel in the parameters of one kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from imf_kernels import checks, dispatch


class Copy(NamedTuple):
    """`source` (None: nothing) goes into `destination`, and `pad` where the source has ended.

    The destination is contiguous. Both have the same dtype, device and number of dimensions, and
    the same sizes from the third on; the first two may differ either way.
    """

    destination: Tensor
    source: Tensor | None
    pad: float = 0.0


def reference(copies: Iterable[Copy]) -> None:
    """Plain PyTorch, the specification."""
    for destination, source, pad in copies:
        if source is None:
            destination.fill_(pad)
            continue
        overlap = tuple(
            slice(min(a, b)) for a, b in zip(destination.shape[:2], source.shape[:2], strict=True)
        )
        if destination[overlap].shape != destination.shape:
            destination.fill_(pad)
        destination[overlap].copy_(source[overlap])


def ragged_copy(copies: Iterable[Copy]) -> None:
    """Run the copies; their destinations must not overlap. No gradient passes.

    Raises:
        ValueError, TypeError: naming the argument, the expected and the given value.
    """
    copies = list(copies)
    for copy in copies:
        _check(*copy)
    if not copies:
        return
    cuda = copies[0].destination.is_cuda
    wanted = dispatch.forced() == "cpp" or (cuda and dispatch.forced() != "reference")
    if wanted and dispatch.has_extension(cuda):
        torch.ops.imf_kernels.ragged_copy(*map(list, zip(*copies, strict=True)))
    else:
        with torch.no_grad():
            reference(copies)


def _check(destination: Tensor, source: Tensor | None, pad: float) -> None:
    if not isinstance(destination, Tensor) or not destination.is_contiguous():
        raise ValueError("destination: expected a contiguous tensor")
    if destination.ndim < 1:
        raise ValueError("destination: expected one dimension or more, got a scalar")
    if source is None:
        return
    free = ["B", "N"][: destination.ndim]
    checks.shape("source", source, *free, *destination.shape[2:])
    checks.dtype("source", source, destination.dtype)
    checks.same_device("source", source, destination.device)
