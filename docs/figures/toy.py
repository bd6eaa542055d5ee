"""A flow in one dimension with a velocity in closed form: noise to a mixture of two Gaussians."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MEANS, WIDTH = torch.tensor([-1.0, 1.4]), 0.2


class Mixture:
    """A velocity model: `E[z_1 - z_0 | z_t = x]` over `z_t = (1 - t) z_0 + t z_1`."""

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, cond: Any) -> Tensor:
        t, x = t[:, None, None, None], x[..., None]
        variance = (1 - t) ** 2 + (t * WIDTH) ** 2
        away = x - t * MEANS
        share = torch.softmax(-(away**2) / (2 * variance), dim=-1)
        return (share * (MEANS + (t * WIDTH**2 - (1 - t)) / variance * away)).sum(dim=-1)
