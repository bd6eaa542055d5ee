"""Time conditioning: the sinusoidal embedding with its MLP, and the `(t, r)` mixer.

The guidance w, of a student that is told it, is embedded alike.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imf_kernels.models.linears import weight_of

FREQUENCIES = 256
TIME_SCALE = 1000.0
GUIDANCE_SCALE = 10.0
"""w is of the order of 1 to 5: the fastest sinusoid turns several times over that range."""


def sinusoidal(t: Tensor, width: int = FREQUENCIES, scale: float = TIME_SCALE) -> Tensor:
    """`sin | cos (scale t exp(-ln(1e4) / (h - 1) k))`, k = 0..h - 1 = width / 2 - 1.

    Float32 `(B,)` -> `(B, width)`.
    """
    half = width // 2
    k = torch.arange(half, device=t.device, dtype=torch.float32)
    angles = scale * t.float()[:, None] * torch.exp(k * -(math.log(1e4) / (half - 1)))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _linear_float32(linear: Any, x: Tensor) -> Tensor:
    bias = linear.bias.float() if linear.bias is not None else None
    return F.linear(x, weight_of(linear).float(), bias)


def _embed(t: Tensor, first: Any, last: Any, scale: float = TIME_SCALE) -> Tensor:
    """`Linear -> SiLU -> Linear` over the sinusoids, in float32 whatever the weights' dtype."""
    with torch.autocast(t.device.type, enabled=False):
        e = _linear_float32(first, sinusoidal(t, first.in_features, scale))
        return _linear_float32(last, F.silu(e))


class TimeEmbedding(nn.Module):
    """The DiTs' embedding of a time: `Linear -> SiLU -> Linear` over 256 sinusoids, in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.time_mlp = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """`(B,)` -> float32 `(B, dim)`."""
        return _embed(t, self.time_mlp[0], self.time_mlp[2])


class TimeMLP(nn.Module):
    """The same under CosyVoice2's names, over as many sinusoids as its input has channels."""

    def __init__(self, sinusoids: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(sinusoids, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        """`(B,)` -> float32 `(B, dim)`."""
        return _embed(t, self.linear_1, self.linear_2)


class GuidanceEmbedding(nn.Module):
    """The same of the guidance w, 0 for every w at initialisation, last layer and all.

    A state dict without any of it (that of a model which is not told w) loads as that.
    """

    def __init__(self, hidden: int, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, dim))
        for parameter in self.mlp[2].parameters():
            nn.init.zeros_(parameter)

    def forward(self, w: Tensor) -> Tensor:
        """`(B,)` -> float32 `(B, dim)`."""
        return _embed(w, self.mlp[0], self.mlp[2], GUIDANCE_SCALE)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if not any(name.startswith(prefix) for name in state_dict):
            for name, value in self.state_dict().items():
                last = name.startswith("mlp.2.")
                state_dict[prefix + name] = torch.zeros_like(value) if last else value
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class TimeEmbedMixer(nn.Linear):
    """`e' = W [e_t, e_r]`, no bias, `W = [D 0]` at initialisation (arXiv 2510.07979, Eq. 9-10).

    D is `diagonal` times the identity. With the default, the identity itself, the student equals
    the teacher for every r, bit for bit in float32. The product stays in float32 under autocast,
    where bf16 would be off by 4e-3. A state dict without a mixer (a teacher's) loads as `[D 0]`.
    """

    def __init__(self, dim: int, diagonal: float = 1.0) -> None:
        self.diagonal = diagonal
        super().__init__(2 * dim, dim, bias=False)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.copy_(self._initial())

    def _initial(self) -> Tensor:
        return self.diagonal * torch.eye(self.out_features, self.in_features)

    def forward(self, e_t: Tensor, e_r: Tensor) -> Tensor:  # type: ignore[override]
        with torch.autocast(e_t.device.type, enabled=False):
            return _linear_float32(self, torch.cat([e_t, e_r], dim=-1))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if f"{prefix}weight" not in state_dict:
            state_dict[f"{prefix}weight"] = self._initial().to(self.weight)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
