"""Classifier-free guidance: one number w for every client's convention::

    v = v_u + w (v_c - v_u)          w = 1 is the conditional branch: no guidance

F5-TTS writes `v_c + s (v_c - v_u)`, so w = 1 + s; CosyVoice `(1 + c) v_c - c v_u`, so w = 1 + c.
"""

from __future__ import annotations

import torch
from torch import Tensor


def from_f5(cfg_strength: float) -> float:
    """w of F5-TTS's `cfg_strength` (its default 2 is w = 3)."""
    return 1.0 + cfg_strength


def from_cosyvoice(inference_cfg_rate: float) -> float:
    """w of CosyVoice's `inference_cfg_rate` (its default .7 is w = 1.7)."""
    return 1.0 + inference_cfg_rate


def combine(velocity: Tensor, w: Tensor | float) -> Tensor:
    """Guided velocity `(B, N, C)`, float32 or wider, of doubled velocities `(2B, N, C)`.

    Rows `[0:B]` are conditional, `[B:2B]` unconditional. `w` is a number or `(B,)`.
    """
    if velocity.shape[0] % 2:
        raise ValueError(
            f"velocity: expected 2B rows, conditional then unconditional, got {velocity.shape[0]}"
        )
    conditional, unconditional = velocity.to(
        torch.promote_types(velocity.dtype, torch.float32)
    ).chunk(2)
    if isinstance(w, Tensor):
        w = w.view(-1, 1, 1)
    return unconditional + w * (conditional - unconditional)
