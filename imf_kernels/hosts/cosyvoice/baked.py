"""A baked student behind the host's own Euler loop, which tells its estimator `t` alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imf_kernels import grids
from imf_kernels.hosts.cosyvoice.estimator import Model, prepare, times
from imf_kernels.models import DiT, Modulation
from imf_kernels.profiling import span


class BakedEstimator(nn.Module):
    """`flow.decoder.estimator` of a student, for hosts whose `decoder` cannot be replaced.

    The mean velocity from each time of one grid to the next, and of nothing else: the host must
    step through this very grid (CosyVoice's own is the cosine grid of 10). A snapshot for
    inference, without the DiT's time conditioning.

    The host's times are found in the grid on the device, each the nearest one. In low precision
    they drift from it; a time further away than that answers NaN, never a neighbour's velocity.

    Args:
        student: The student, or a teacher's model (with `doubled=False`).
        grid: A named grid, or times from 0 to 1.
        nfe: Steps of a named grid; None: 10.
        doubled: The host doubles its rows for guidance, which a student does not need: the first
            half is evaluated and answers for both, so that `(1 + c) a - c a = a`. False: all rows
            are evaluated.
        guidance: w of a student that is told it.

    Raises:
        ValueError: not a grid, or one whose times lie so close that those of a host in the
            student's dtype cannot be told apart; the first call raises it for another dtype.
    """

    def __init__(
        self,
        student: Model,
        grid: str | Tensor | Sequence[float] = "cosine",
        nfe: int | None = None,
        *,
        doubled: bool = True,
        guidance: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(student, Model):
            raise TypeError(
                f"student: expected a DiT or a CausalUNet, got {type(student).__name__}"
            )
        if nfe is None and isinstance(grid, str):
            nfe = 10
        self.grid = grids.make(grid, nfe).cpu()
        self.doubled, self.guidance = doubled, guidance
        student.check_guidance(guidance, 1)
        self._tolerances = {student.dtype: tolerance(self.grid, student.dtype)}
        known = self.grid.to(student.last.weight.device)
        self.times: Tensor
        self.blocks: Tensor
        self.final: Tensor
        self.register_buffer("times", known[:-1], persistent=False)
        tables = student.tables(known[:-1], known[1:])
        self.register_buffer("blocks", tables.blocks, persistent=False)
        self.register_buffer("final", tables.final, persistent=False)
        self.model = student.baked() if isinstance(student, DiT) else copy.deepcopy(student)
        self.eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """The weights'."""
        return self.model.dtype

    @torch.no_grad()
    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        mu: Tensor,
        t: Tensor,
        spks: Tensor,
        cond: Tensor,
        streaming: bool = False,
        *,
        r: Tensor | None = None,
        within: float | None = None,
    ) -> Tensor:
        """As of `Estimator`; rows at a time that is none of the grid's are NaN.

        `r` is not read (Chatterbox gives it): a step ends at the grid's next time. `within` is how
        far `t` may be from the grid; None: as far as times of its dtype drift.
        """
        rows = len(x)
        if self.doubled:
            if rows % 2:
                raise ValueError(f"x: expected conditional and unconditional rows, got {rows} rows")
            rows //= 2
        if within is None:
            if t.dtype not in self._tolerances:
                self._tolerances[t.dtype] = tolerance(self.grid, t.dtype)
            within = self._tolerances[t.dtype]
        start = times("t", t, len(x))[:rows]
        distance, step = (start[:, None] - self.times).abs().min(dim=1)
        known = distance <= within

        said = mask[:rows], mu[:rows], spks[:rows], cond[:rows]
        given = prepare(self.model, *said, streaming, told=self.guidance)
        modulation = Modulation(self.blocks[step, 0].unbind(1), self.final[step, 0])
        with span("evaluation"):
            u = self.model.evaluate(x[:rows].mT.contiguous(), modulation, given)
        u = u.mT.float().masked_fill(~known[:, None, None], torch.nan)
        return u.repeat(2, 1, 1) if self.doubled else u.contiguous()

    def _apply(self, fn: Any, recurse: bool = True) -> BakedEstimator:
        """Times and tables move, but stay float32."""
        kept = {name: getattr(self, name) for name in ("times", "blocks", "final")}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            setattr(self, name, tensor.to(getattr(self, name).device))
        return self


def tolerance(grid: Tensor, dtype: torch.dtype) -> float:
    """How far from the grid the times of a host in this dtype may be.

    That is how far they drift here, and a unit in the last place for other devices.

    Raises:
        ValueError: half a step of the grid, or more.
    """
    drift = (host_times(grid, dtype).float() - grid[:-1]).abs().max()
    allowed = max(float(drift) + torch.finfo(dtype).eps / 2, 1e-6)
    gap = float(grid.diff().min())
    if 2 * allowed >= gap:
        raise ValueError(
            f"grid: expected times more than {2 * allowed:.2g} apart for a host whose times are "
            f"{dtype}, got {gap:.2g} in {grid.tolist()}"
        )
    return allowed


def host_times(grid: Tensor, dtype: torch.dtype) -> Tensor:
    """The times `(NFE,)` at which the host's loop, in this dtype, calls its estimator."""
    span = grid.to(dtype)
    nfe = len(grid) - 1
    if torch.equal(grid, grids.cosine(nfe)):  # the host's own, made in its dtype
        span = 1 - torch.cos(torch.linspace(0, 1, nfe + 1, dtype=dtype) * 0.5 * torch.pi)
    accumulated = [span[0]]
    for end in span[1:-1]:
        accumulated.append(accumulated[-1] + (end - accumulated[-1]))
    return torch.stack(accumulated)
