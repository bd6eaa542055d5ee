"""Which updates are bad, and what is written down about them."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from imf_kernels.files import replacing
from imf_kernels.objectives.batch import Batch

WINDOW = 100
"""Good updates whose medians are the measure."""
ENOUGH = 10
"""Good updates without which there is no median yet."""


class Guard:
    """Judges updates by loss and gradient norm, which are the same on all ranks.

    `skipped` counts the bad ones, `in_a_row` those since the last good one.
    """

    def __init__(self, explode: float) -> None:
        self.explode, self.skipped, self.in_a_row = explode, 0, 0
        self.good = {"loss": deque[float](maxlen=WINDOW), "norm": deque[float](maxlen=WINDOW)}

    def judge(self, loss: float, norm: float) -> str | None:
        """What is wrong with an update, or None."""
        values = {"loss": loss, "norm": norm}
        for name, value in values.items():
            wrong = self._wrong(name, abs(value))
            if wrong is not None:
                self.skipped += 1
                self.in_a_row += 1
                return wrong
        for name, value in values.items():
            self.good[name].append(abs(value))
        self.in_a_row = 0
        return None

    def _wrong(self, name: str, value: float) -> str | None:
        if not math.isfinite(value):
            return f"{name} {value}"
        usual = median(self.good[name]) if len(self.good[name]) >= ENOUGH else 0.0
        if usual > 0 and value > self.explode * usual:
            return f"{name} {value:.4g}, more than {self.explode:g} times its median {usual:.4g}"
        return None

    def state_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        counts = {"skipped": self.skipped, "in_a_row": self.in_a_row}
        return {**counts, **{name: list(kept) for name, kept in self.good.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        for name, kept in self.good.items():
            kept.clear()
            kept.extend(state[name])


def rows(batch: Batch, loss: Tensor, info: Mapping[str, Tensor]) -> dict[str, Any]:
    """A batch of a bad update: its loss, its rows' names and what the objective told of each."""
    each = {name: value.tolist() for name, value in info.items() if value.ndim == 1}
    return {
        "loss": float(loss),
        "names": list(batch.names),
        "lengths": batch.lengths.tolist(),
        **each,
    }


def report(
    folder: Path,
    told: Mapping[str, Any],
    guard: Guard,
    ranks: Sequence[Sequence[Mapping[str, Any]]],
) -> Path:
    """Write `bad_<update>.json`: what is told, what was good before, and every rank's batches."""
    path = folder / f"bad_{told['update']:08d}.json"
    batches = [{"rank": k, **batch} for k, rank in enumerate(ranks) for batch in rank]
    folder.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        whole = {**told, "before": guard.state_dict(), "batches": batches}
        temporary.write_text(json.dumps(whole, indent=1))
    return path
