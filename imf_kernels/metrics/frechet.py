"""The Frechet distance of mel patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imf_kernels.metrics import mels


def frechet(generated: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Squared Frechet distance between Gaussians fitted to 3-frame patches; 0 is best.

    `|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2))` over the 3 C values of a patch, in squared units
    of the mels (normalised ones have a total variance of about 3 C). Some thousand patches
    determine the covariances; nothing is inverted, so near-singular ones do no harm.

    Args:
        generated: Mels `(N_i, C)`, frame by frame the true ones' counterparts.
        truth: Of the same shapes.
    """
    mels.check(generated, truth)
    (mean_g, cov_g), (mean_t, cov_t) = (
        (patches.mean(dim=0), torch.cov(patches.T))
        for patches in (torch.cat(mels.patches(side)).double() for side in (generated, truth))
    )
    # tr (S S')^(1/2) = tr (S^(1/2) S' S^(1/2))^(1/2), whose argument is symmetric.
    eigenvalues, vectors = torch.linalg.eigh(cov_t)
    root = vectors * eigenvalues.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_g @ root).clamp(min=0).sqrt().sum()
    spread = cov_g.trace() + cov_t.trace() - 2 * cross
    return ((mean_g - mean_t).square().sum() + spread).clamp(min=0).item()
