"""Validation by NFE: how far the student's few steps are from the guided teacher's many."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imf_kernels import checks, grids
from imf_kernels.distill.held_out import Extra, FineSolves, student_mel
from imf_kernels.files import replacing
from imf_kernels.objectives.batch import Batch


class Validation:
    """RMSE to the teacher's fine solve from the same noise, over the frames that are generated.

    A callback of the `Trainer`: before the first update, every `every` updates, and after the last,
    it puts "val/nfe1", ... into the record, for the loggers behind it. The ranks share the batches.
    `folder/validation.json` holds all of them, and the best of each; a run that resumes drops what
    lies beyond its start.

    Args:
        batches: Held out, the same on all ranks.
        solves: Of the teacher.
        every: Updates between.
        nfe: Numbers of steps.
        grid: A named grid, or grids by number of steps.
        extra: See `held_out.Extra`.
    """

    name = "validation.json"

    def __init__(
        self,
        batches: Sequence[Batch],
        solves: FineSolves,
        *,
        every: int = 1000,
        nfe: Sequence[int] = (1, 2, 3, 4),
        grid: str | Mapping[int, Any] = "uniform",
        extra: Extra | None = None,
    ) -> None:
        if not batches:
            raise ValueError("batches: expected one or more, got none")
        checks.positive_int("every", every)
        self.grids = {
            steps: grids.make(grid if isinstance(grid, str) else grid[steps], steps)
            for steps in nfe
        }
        self.batches, self.solves, self.every, self.extra = batches, solves, every, extra
        self.history: list[dict[str, float]] = []

    def started(self, trainer: Any) -> None:
        path = self._path(trainer)
        goes_on = trainer.update > 0 and path.exists()
        held = json.loads(path.read_text())["history"] if goes_on else []
        self.history = [entry for entry in held if entry["update"] <= trainer.update]

    def begun(self, trainer: Any, record: dict[str, float]) -> None:
        """The untrained student: what the others are to be better than."""
        self._tell(trainer, record)

    def updated(self, trainer: Any, record: dict[str, float]) -> None:
        if trainer.update % self.every == 0 or trainer.update == trainer.settings.updates:
            self._tell(trainer, record)

    def _tell(self, trainer: Any, record: dict[str, float]) -> None:
        found = self(trainer)
        record.update(found)
        self.history.append({"update": trainer.update, **found})
        if trainer.accelerator.is_main_process:
            said = {"best": self.best, "history": self.history}
            with replacing(self._path(trainer)) as temporary:
                temporary.write_text(json.dumps(said, indent=1))

    @property
    def best(self) -> dict[str, dict[str, float]]:
        """Of each number of steps, the least finite distance and its update."""
        best = {}
        for name in (f"val/nfe{steps}" for steps in self.grids):
            entries = [e for e in self.history if math.isfinite(e.get(name, math.nan))]
            if entries:
                least = min(entries, key=lambda entry: entry[name])
                best[name] = {"update": least["update"], "value": least[name]}
        return best

    def __call__(self, trainer: Any) -> dict[str, float]:
        """The distances now, by name; on every rank those of all."""
        accelerator, rank = trainer.accelerator, trainer.accelerator.process_index
        ranks, count = accelerator.num_processes, len(self.batches)
        sums = torch.zeros(len(self.grids) + 1, dtype=torch.float64)
        with trainer.averaged():
            # all ranks evaluate equally often, as sharded weights want it
            for index in range(rank, -(-count // ranks) * ranks, ranks):
                which, counts = index % count, float(index < count)
                batch = self.batches[which].to(accelerator.device)
                fine, noise = self.solves.of(batch, which), self.solves.noise(batch, which)
                mask = batch.counted("span")[:, :, None]
                for i, (steps, grid) in enumerate(self.grids.items()):
                    mel = student_mel(trainer.student, noise, batch, steps, grid, self.extra)
                    sums[i] += counts * _squares(mel - fine, mask)
                sums[-1] += counts * float(mask.sum()) * fine.shape[-1]
        total = accelerator.reduce(sums.to(accelerator.device), "sum").tolist()
        return {
            f"val/nfe{steps}": (value / total[-1]) ** 0.5
            for steps, value in zip(self.grids, total[:-1], strict=True)
        }

    def _path(self, trainer: Any) -> Path:
        return Path(trainer.folder) / self.name


def _squares(error: Tensor, mask: Tensor) -> float:
    return float(error.masked_fill(~mask, 0.0).double().square().sum())
