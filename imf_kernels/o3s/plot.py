"""A search as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from imf_kernels.files import replacing

if TYPE_CHECKING:
    from imf_kernels.o3s.result import SearchResult


def plot(result: SearchResult, path: str | Path | None) -> Any:
    """See `SearchResult.plot`."""
    from matplotlib.figure import Figure

    positions = range(1, result.nfe)
    figure = Figure(figsize=(3.2 * max(len(positions), 1), 3.0), layout="constrained")
    best = result.best
    for position in positions:
        axes = figure.add_subplot(1, len(positions), position)
        tried = [e for e in result.evaluations if e.position == position]
        sweeps = [e.sweep or 0 for e in tried]
        axes.scatter([e.grid[position] for e in tried], [e.value for e in tried], c=sweeps, s=18)
        axes.axhline(result.evaluations[0].value, color="0.6", lw=1, ls="--", label="start")
        axes.plot(best.grid[position], best.value, "*", ms=13, color="C3", label="best")
        axes.set_xlabel(f"$t_{position}$")
        if position == 1:
            axes.set_ylabel(
                "metric, " + ("higher" if result.higher_is_better else "lower") + " is better"
            )
            axes.legend(fontsize=8)
    if path is not None:
        with replacing(Path(path)) as temporary:
            figure.savefig(temporary, dpi=120, format=Path(path).suffix.lstrip(".") or "png")
    return figure
