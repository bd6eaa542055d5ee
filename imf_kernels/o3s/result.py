"""What a search found, and all that it evaluated."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imf_kernels.files import replacing
from imf_kernels.o3s.plot import plot


@dataclass(frozen=True)
class Evaluation:
    """One evaluated grid. `sweep` and `position` say what it was tried for (None: the start)."""

    grid: tuple[float, ...]
    value: float
    sweep: int | None
    position: int | None


@dataclass
class SearchResult:
    """What a search found, all it evaluated, and the settings that define it.

    A result is resumable: `search(..., resume=result)` repeats the same decisions from the
    evaluations it holds and pays only for new ones.

    Attributes:
        nfe, higher_is_better, start, tolerance, min_gap, min_gain, method: The settings.
        evaluations: Every paid evaluation, in order.
        stopped: "converged", "budget" or "sweeps"; "running" until then.
    """

    nfe: int
    higher_is_better: bool
    start: tuple[float, ...]
    tolerance: float
    min_gap: float
    min_gain: float
    evaluations: list[Evaluation] = field(default_factory=list)
    stopped: str = "running"
    method: str = "ternary"

    @property
    def best(self) -> Evaluation:
        """The best evaluation; the earliest among equals, so never worse than the start."""
        if not self.evaluations:
            raise ValueError("evaluations: expected at least one, got none")
        key = ascending(self.higher_is_better)
        return min(self.evaluations, key=lambda evaluation: key(evaluation.value))

    @property
    def grid(self) -> Tensor:
        """The best grid, float32 `(nfe + 1,)`."""
        return torch.tensor(self.best.grid, dtype=torch.float32)

    @property
    def value(self) -> float:
        return self.best.value

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        with replacing(Path(path)) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> SearchResult:
        """Read what `save` wrote.

        Raises:
            ValueError: not a saved search; the error names the file.
        """
        try:
            saved = json.loads(Path(path).read_text())
            saved["start"] = tuple(saved["start"])
            saved["evaluations"] = [
                Evaluation(**{**item, "grid": tuple(item["grid"])}) for item in saved["evaluations"]
            ]
            return cls(**saved)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"path: expected a saved O3S search, got {path}: {error}") from error

    def plot(self, path: str | Path | None = None) -> Any:
        """The metric against each position, one panel per interior time (needs matplotlib).

        Returns the figure; `path` also writes it.
        """
        return plot(self, path)


def ascending(higher_is_better: bool) -> Callable[[float], float]:
    """Maps a metric's value to a cost, lower is better, NaN worst."""
    sign = -1.0 if higher_is_better else 1.0
    return lambda value: math.inf if math.isnan(value) else sign * value
