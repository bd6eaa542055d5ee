"""The distance to a teacher's fine solve."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from imf_kernels.metrics import mels


def to_teacher(generated: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Root mean square distance to the teacher's fine solve from the same noise; 0 is best.

    In units of the mels, over all frames and channels.

    Args:
        generated: Mels `(N_i, C)`.
        reference: The teacher's, of the same shapes.
    """
    mels.check(generated, reference)
    return (mels.frames(generated) - mels.frames(reference)).square().mean().sqrt().item()
