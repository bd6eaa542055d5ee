"""The whole search for a student: development set, ranks, cache and result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
import torch.distributed as dist
from torch import Tensor, nn

from imf_kernels import seeds
from imf_kernels.graphs import GraphSampler
from imf_kernels.models import StepTokenDiT, state_dicts
from imf_kernels.o3s.cache import DiskCache
from imf_kernels.o3s.metric import ranks_of
from imf_kernels.o3s.result import SearchResult
from imf_kernels.o3s.samples import DevBatch, on_batches
from imf_kernels.o3s.search import search
from imf_kernels.o3s.sharding import mean
from imf_kernels.objectives.batch import Batch


def find_grid(
    model: nn.Module | GraphSampler,
    batches: Sequence[Batch],
    metric: Callable[[Tensor, Batch], Any],
    nfe: int,
    *,
    higher_is_better: bool,
    folder: str | Path,
    name: str,
    seed: int = 0,
    guidance: float | None = None,
    settings: Mapping[str, Any] | None = None,
    reduce: Callable[[list[Any]], float] = mean,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> SearchResult:
    """O3S on a development set, by all ranks of a group, cached; started again it goes on.

    Args:
        model: A student, or with `guidance` a teacher's model, in eval mode.
        batches: The development set, the same on every rank, on the model's device. Their
            `conditions` go to `model.prepare`, once: for a `StepTokenDiT` with `steps`, `nfe`.
        metric: `metric(samples, batch)`; see `on_batches`.
        folder: Gets `evaluations/` (a `DiskCache`) and `o3s_nfe<nfe>_<name>.json` (the result;
            what file names cannot hold is quoted as in URLs).
        name: Of the metric, for the result and the cache, which tells development sets apart by
            their tensors. A short one.
        seed: Of the noise; batch k's is drawn from `seeds.seed(seed, k)`.
        settings: What else the values depend on, for the cache.
        options: Of `search`.

    Errors are those of `on_batches`, `DiskCache` and `search`; and ValueError for a long `name`.
    """
    _check_steps(model, batches, nfe)
    folder = Path(folder)
    save_to = folder / f"o3s_nfe{nfe}_{quote(name, safe=' @')}.json"
    if len(save_to.name) > 200:
        raise ValueError(f"name: expected a short one, for a file's name, got {name!r}")
    measured = on_batches(
        model,
        _Development(model, batches, seed, guided=guidance is not None),
        metric,
        guidance=guidance,
        costs=[batch.x1.shape[0] * batch.x1.shape[1] for batch in batches],
        reduce=reduce,
        group=group,
    )
    cached = DiskCache(folder / "evaluations").wrap(
        measured,
        model=model,
        name=name,
        guidance=guidance,
        seed=seed,
        batches=ranks_of(measured).first(lambda: _fingerprint(batches)),
        **(settings or {}),
    )
    return search(
        cached,
        nfe,
        higher_is_better=higher_is_better,
        save_to=save_to,
        **options,
    )


def _fingerprint(batches: Sequence[Batch]) -> str:
    """A hash of a development set."""
    tensors, others = {}, []
    for i, batch in enumerate(batches):
        given = {"x1": batch.x1, "lengths": batch.lengths, "loss_mask": batch.loss_mask}
        for name, value in {**given, **batch.conditions}.items():
            if isinstance(value, Tensor):
                tensors[f"{i}.{name}"] = value
            else:
                others.append(f"{i}.{name}={value}")
    return state_dicts.fingerprint(" ".join(others), tensors)


def _check_steps(model: Any, batches: Sequence[Batch], nfe: int) -> None:
    """A model that is told its number of steps evaluates grids of another all the same."""
    model = model.model if isinstance(model, GraphSampler) else model
    if isinstance(model, StepTokenDiT):
        for batch in batches:
            if batch.conditions.get("steps") != nfe:
                raise ValueError(
                    f"batches: expected conditions with steps {nfe} for this model and nfe {nfe}, "
                    f"got {batch.conditions.get('steps')}"
                )


class _Development:
    """Batches with their noise, prepared when they are read."""

    def __init__(
        self,
        model: nn.Module | GraphSampler,
        batches: Sequence[Batch],
        seed: int,
        guided: bool,
    ) -> None:
        self.model: Any = model.model if isinstance(model, GraphSampler) else model
        self.batches, self.seed = batches, seed
        self.branches = {"guided": True} if guided else {}

    def __len__(self) -> int:
        return len(self.batches)

    @torch.no_grad()
    def __getitem__(self, index: int) -> DevBatch:
        batch = self.batches[index]
        generator = torch.Generator().manual_seed(seeds.seed(self.seed, index))
        noise = torch.randn(batch.x1.shape, generator=generator, dtype=batch.x1.dtype)
        cond = self.model.prepare(lengths=batch.lengths, **batch.conditions, **self.branches)
        return DevBatch(noise.to(batch.x1.device), cond, batch)
