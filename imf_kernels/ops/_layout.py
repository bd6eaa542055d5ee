"""The layout that kernels read."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """Each tensor contiguous, copied only where it is not; None stays None."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]
