"""Where a frame stands: the grouped position convolutions and rotary angles."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imf_kernels.models.scope import Scope
from imf_kernels.ops import grouped_conv_mish
from imf_kernels.rows import Rows

KERNEL, GROUPS = 31, 16


class GroupedConv(nn.Conv1d):
    """A convolution within each row, and Mish."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, KERNEL, groups=GROUPS)

    def forward(  # type: ignore[override]
        self, x: Tensor, rows: Rows, causal: bool, residual: Tensor | None = None
    ) -> Tensor:
        bias: Any = self.bias
        return grouped_conv_mish(x, self.weight, bias, rows, causal=causal, residual=residual)

    def lay_out(self) -> None:
        """Taps before channels in memory, as the kernel reads them: else it copies at each call.

        Shape, values and state dict stay as they are. Only of a frozen weight: an optimizer's state
        would keep the other strides.
        """
        if self.weight.requires_grad:
            return
        taps_first = self.weight.data.transpose(1, 2)
        if not taps_first.is_contiguous():
            self.weight.data = taps_first.contiguous().transpose(1, 2)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:  # safetensors takes whole tensors only
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"].contiguous()


class ConvPositionEmbedding(nn.Module):
    """Two grouped convolutions with Mish over the frames of rows, seeing both sides (F5-TTS)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1d = nn.ModuleDict({"0": GroupedConv(dim), "2": GroupedConv(dim)})

    def forward(self, x: Tensor, scope: Scope, residual: Tensor | None = None) -> Tensor:
        """`(T, dim)`, plus the residual; zero where there is no row."""
        first, second = self.conv1d.values()
        return second(first(x, scope.rows, False), scope.rows, False, residual)


class CausalConvPositionEmbedding(nn.Module):
    """The same, each convolution looking back only (CosyVoice3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.ModuleList([GroupedConv(dim)])
        self.conv2 = nn.ModuleList([GroupedConv(dim)])

    def forward(self, x: Tensor, scope: Scope, residual: Tensor | None = None) -> Tensor:
        """`(T, dim)`, plus the residual; zero where there is no row."""
        h = self.conv1[0](scope.preceded(x), scope.rows, True)
        return self.conv2[0](scope.preceded(h), scope.rows, True, residual)


class Rope(NamedTuple):
    """Rotary angles `(P, head_dim)`, of the places that frames have in these rows."""

    angles: Tensor
    rows: Rows

    @staticmethod
    def of_frames(angles: Tensor) -> Rope:
        """An angle of its own for each of T frames."""
        frames = angles.shape[0]
        length = torch.full((1,), frames, device=angles.device)
        return Rope(angles, Rows.padded(length, frames))


class RotaryEmbedding(nn.Module):
    """Rotary angles, never in less than float32.

    `inv_freq` keeps its place in the clients' state dicts, but is always computed anew: in half
    precision, cast or loaded, the angles would be off by .3 rad within 700 frames.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.register_buffer("inv_freq", None)
        self._restore(None)

    def _restore(self, device: torch.device | None) -> None:
        k = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device)
        self.inv_freq = 1.0 / (1e4 ** (k / self.head_dim))

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryEmbedding:
        super()._apply(fn, recurse)
        self._restore(self.inv_freq.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._restore(self.inv_freq.device)

    def forward(self, frames: int) -> Tensor:
        """Of the first frames `(frames, head_dim)`, see `at`."""
        return self.at(torch.arange(frames, device=self.inv_freq.device))

    def at(self, position: Tensor) -> Tensor:
        """`(T, head_dim)` float32: cosines of the angles at `(T,)`, then sines."""
        # in float32 1e-4 rad off at 3,000 frames
        angles = torch.outer(position.double(), self.inv_freq.double())
        return torch.cat([angles.cos(), angles.sin()], dim=-1).float()
