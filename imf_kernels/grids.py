"""Time grids: float32 tensors of NFE + 1 ascending times from 0 (noise) to 1 (data).

A schedule is data. Named grids are `(nfe + 1,)` on the CPU; `validate` is the door for grids from
elsewhere, which stay on their device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imf_kernels import checks

EPSS_TABLES: dict[int, tuple[int, ...]] = {
    5: (0, 2, 4, 8, 16, 32),
    6: (0, 2, 4, 6, 8, 16, 32),
    7: (0, 2, 4, 6, 8, 16, 24, 32),
    10: (0, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32),
    12: (0, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32),
    16: (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32),
}
"""Fast F5-TTS's empirically pruned step positions (arXiv 2505.19931), in 1/32, before sway."""


def uniform(nfe: int) -> Tensor:
    """`k / nfe`."""
    checks.positive_int("nfe", nfe)
    return torch.linspace(0.0, 1.0, nfe + 1, dtype=torch.float32)


def warp_sway(grid: Tensor, coefficient: float = -1.0) -> Tensor:
    """F5-TTS's sway sampling of any grid: `t + s (cos(pi t / 2) - 1 + t)`."""
    swayed = grid + coefficient * (torch.cos(torch.pi / 2 * grid) - 1 + grid)
    return _pin_ends(swayed)


def sway(nfe: int, coefficient: float = -1.0) -> Tensor:
    """A uniform grid under sway; s = -1 puts the steps near the noise."""
    return validate(warp_sway(uniform(nfe), coefficient))


def epss(nfe: int, coefficient: float = -1.0) -> Tensor:
    """F5-TTS's grid: the EPSS table where one exists for `nfe`, else uniform; then sway."""
    checks.positive_int("nfe", nfe)
    table = EPSS_TABLES.get(nfe)
    grid = uniform(nfe) if table is None else torch.tensor(table, dtype=torch.float32) / 32
    return validate(warp_sway(grid, coefficient))


def cosine(nfe: int) -> Tensor:
    """CosyVoice's grid: `1 - cos(pi t / 2)`."""
    return _pin_ends(1 - torch.cos(torch.pi / 2 * uniform(nfe)))


def validate(grid: Tensor | Sequence[float], *, min_gap: float = 0.0, name: str = "grid") -> Tensor:
    """A custom grid as a float32 tensor, checked. `name` is the argument that errors speak of.

    Raises:
        ValueError: not one-dimensional, fewer than two times, not finite, ends other than 0 and 1,
            not strictly ascending, or neighbours closer than `min_gap`. The values of a CUDA grid
            are not read.
    """
    grid = torch.as_tensor(grid, dtype=torch.float32)
    if grid.ndim != 1 or grid.numel() < 2:
        raise ValueError(
            f"{name}: expected shape (nfe + 1,) with nfe >= 1, got {tuple(grid.shape)}"
        )
    if not checks.readable(grid):
        return grid
    times = grid.tolist()
    if not bool(torch.isfinite(grid).all()):
        raise ValueError(f"{name}: expected finite times, got {times}")
    if times[0] != 0.0 or times[-1] != 1.0:
        raise ValueError(f"{name}: expected times from 0 to 1, got {times}")
    gaps = grid.diff()
    if not bool((gaps > 0).all()):
        raise ValueError(f"{name}: expected strictly ascending times, got {times}")
    if float(gaps.min()) < min_gap - 1e-6:  # float32 times
        raise ValueError(f"{name}: expected neighbours at least {min_gap} apart, got {times}")
    return grid


NAMED = {"uniform": uniform, "sway": sway, "epss": epss, "cosine": cosine}


def make(
    grid: str | Tensor | Sequence[float], nfe: int | None = None, *, name: str = "grid"
) -> Tensor:
    """A named grid ("uniform", "sway", "epss", "cosine") of `nfe` steps, or a validated custom one.

    Raises:
        ValueError: unknown name, `nfe` missing for a name or different from a custom grid's.
    """
    if isinstance(grid, str):
        checks.choice(name, grid, tuple(NAMED))
        if nfe is None:
            raise ValueError(f"nfe: expected an integer for the named grid {grid!r}, got None")
        return NAMED[grid](nfe)
    grid = validate(grid, name=name)
    if nfe is not None and grid.numel() != nfe + 1:
        raise ValueError(f"{name}: expected {nfe + 1} times for nfe = {nfe}, got {grid.numel()}")
    return grid


def _pin_ends(grid: Tensor) -> Tensor:
    """Rounding leaves the ends a few 1e-8 away from 0 and 1."""
    grid = grid.clone()
    grid[0], grid[-1] = 0.0, 1.0
    return grid
