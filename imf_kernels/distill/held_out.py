"""What validation and previews share: fixed noise, the teacher's fine solves, student's mels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imf_kernels import checks, sampler, seeds
from imf_kernels.models import checkpoints, state_dicts
from imf_kernels.objectives.batch import Batch
from imf_kernels.teacher import Teacher

Extra = Callable[[int], Mapping[str, Any]]
"""What a student's `prepare` is told besides a batch's conditions, for a number of steps."""


class FineSolves:
    """The guided teacher's solves of held-out batches, each computed once and kept on disk.

    Args:
        teacher: With its guidance.
        folder: Where they are kept, under a hash of the teacher's weights, the batch and the noise.
        steps: Of the uniform grid.
        seed: Of the noise.
    """

    def __init__(self, teacher: Teacher, folder: str | Path, *, steps: int = 32, seed: int = 0):
        checks.positive_int("steps", steps)
        self.teacher, self.folder, self.steps, self.seed = teacher, Path(folder), steps, seed
        self._weights: str | None = None

    def noise(self, batch: Batch, index: int = 0) -> Tensor:
        """State at time 0 of the `index`-th batch: as `o3s.find_grid` draws it, on any device."""
        generator = torch.Generator().manual_seed(seeds.seed(self.seed, index))
        return torch.randn(batch.x1.shape, generator=generator).to(batch.x1.device)

    def of(self, batch: Batch, index: int = 0) -> Tensor:
        """The solve from that noise, float32 `(B, N, C)` on the batch's device."""
        path = self.folder / f"{self._key(batch, index)}.safetensors"
        if path.exists():
            return checkpoints.read(path)["mel"].to(batch.x1.device, copy=True)
        teacher = self.teacher
        with torch.no_grad():
            cond = teacher.prepare(lengths=batch.lengths, **batch.conditions)
            mel = sampler.sample(
                teacher.model,
                self.noise(batch, index),
                cond,
                nfe=self.steps,
                guidance=teacher.guidance,
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoints.write(path, {"mel": mel.cpu()})
        return mel

    @property
    def of_what(self) -> str:
        """The teacher's weights, as a hash, the steps and the guidance."""
        if self._weights is None:
            model = self.teacher.model
            held = model.state_dict() if isinstance(model, nn.Module) else {}
            self._weights = state_dicts.fingerprint(type(model).__name__, held)
        return f"{self._weights} {self.steps} {self.teacher.guidance}"

    def _key(self, batch: Batch, index: int) -> str:
        given = {"x1": batch.x1, "lengths": batch.lengths, **batch.conditions}
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in given.items() if name not in tensors}
        seed = seeds.seed(self.seed, index)
        said = f"{self.of_what} {seed} {others}"
        return state_dicts.fingerprint(said, tensors)[:32]


def student_mel(
    student: Any,
    noise: Tensor,
    batch: Batch,
    nfe: int,
    grid: Any = "uniform",
    extra: Extra | None = None,
) -> Tensor:
    """A student's solve of a batch, float32 `(B, N, C)`.

    Through its forward alone, which is what a student whose weights are sharded has.
    """
    told = {} if extra is None else extra(nfe)
    with torch.no_grad():
        cond = student.prepare(lengths=batch.lengths, **batch.conditions, **told)
        return sampler.sample(
            lambda x, t, r, cond: student(x, t, r, cond), noise, cond, grid, nfe=nfe
        )
