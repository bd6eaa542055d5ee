"""Step tables: all that depends on `(t, r)` only, computed once for a whole grid.

With the times of a grid known, the time MLP of both, their mixer and every modulation made of them
are a small exact table; an evaluation then reads one row of it instead of 41 % of F5-TTS's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from imf_kernels.ops.linear import linear


class Modulation(NamedTuple):
    """Every modulation at one `(t, r)`: R = 1 for all rows, or one per evaluated row.

    Of a `DiT`, adaLN: `blocks` holds, per block, `(R, 6, D)`: shift, scale, gate of the attention,
    then of the MLP; `final` is `(R, 2, D)`: scale, shift. Of a `CausalUNet`: `blocks` holds, per
    ResNet block, `(R, D)`, a shift; `final` is of no vectors, `(R, 0, D)`.
    """

    blocks: Sequence[Tensor]
    final: Tensor


class StepTables(NamedTuple):
    """Modulations of NFE steps, float32, with D of unit stride; both may be views of one tensor.

    `blocks` is `(NFE, R, depth, 6, D)` and `final` `(NFE, R, 2, D)` of a `DiT`, `(NFE, R, blocks,
    D)` and `(NFE, R, 0, D)` of a `CausalUNet`.
    """

    blocks: Tensor
    final: Tensor

    def at(self, step: int) -> Modulation:
        return Modulation(self.blocks[step].unbind(1), self.final[step])

    def to(self, device: torch.device | str) -> StepTables:
        return StepTables(self.blocks.to(device), self.final.to(device))

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes + self.final.nbytes


def linear_float32(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x W^T + b` in float32, `x` float32, for weights of any dtype, which are read once.

    On CUDA a half precision W meets `x` as two numbers of its own dtype, high and low part, in one
    product with float32 results: 16 bits of `x` or more count, and W is never copied to float32.
    """
    if weight.dtype in (torch.bfloat16, torch.float16):
        if weight.is_cuda:
            high = x.to(weight.dtype)
            low = (x - high.float()).to(weight.dtype)
            parts = torch.mm(torch.cat([high, low]), weight.t(), out_dtype=torch.float32)
            return parts[: len(x)] + parts[len(x) :] + bias.float()
        slices = [linear(x, part.float(), None) for part in weight.split(8 * weight.shape[1])]
        return torch.cat(slices, dim=-1) + bias.float()
    return linear(x, weight.float(), bias.float())
