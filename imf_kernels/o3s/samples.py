"""Metrics of grids from metrics of samples, which are solved from the same noise for every grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from imf_kernels.graphs import GraphSampler
from imf_kernels.o3s.metric import Metric
from imf_kernels.o3s.sharding import Items, mean, plain, sharded
from imf_kernels.sampler import sample
from imf_kernels.solver import VelocityModel


@dataclass(frozen=True)
class DevBatch:
    """Rows of a development set that are solved together.

    Attributes:
        noise: State at time 0, float32 `(B, N, C)`.
        cond: From `model.prepare`.
        reference: Whatever the metric compares the samples with.
    """

    noise: Tensor
    cond: Any
    reference: Any = None


def on_samples(
    model: VelocityModel | GraphSampler,
    noise: Tensor,
    cond: Any,
    metric: Callable[[Tensor], float],
    *,
    guidance: Tensor | float | None = None,
) -> Metric:
    """A metric of grids from a metric of samples `(B, N, C)`: the same noise for every grid.

    With a `GraphSampler` all grids are replays of one graph.
    """
    solve = _solver(model, guidance)
    return lambda grid: metric(solve(noise, cond, grid))


def on_batches(
    model: VelocityModel | GraphSampler,
    batches: Items[DevBatch],
    metric: Callable[[Tensor, Any], Any],
    *,
    guidance: float | None = None,
    costs: Sequence[float] | None = None,
    reduce: Callable[[list[Any]], float] = mean,
    group: dist.ProcessGroup | None = None,
) -> Metric:
    """A metric of grids over a list of batches, of which every rank solves its share.

    Every rank of the group makes the metric and calls it. The result is the same to the bit on any
    number of ranks of the same hardware: a batch stays whole, wherever it is solved.

    Args:
        model: The same on every rank.
        batches: At least one; of the same rows in the same order on every rank.
        metric: `metric(samples, reference)` of a batch's samples `(B, N, C)`, of which the frames
            beyond a row's length are noise: a tensor or a list of B values, one a row; or one
            number for the batch.
        guidance: w of a guided solve, for conditionings with both branches.
        costs: Of the batches. None: the frames of their noise, padding included. If given, a rank
            reads the batches of its share only, once.
        reduce: Makes a number of all rows' values, in order.
        group: See `sharded`; as are the errors.
    """
    if costs is None:
        costs = [batches[k].noise[..., 0].numel() for k in range(len(batches))]
    solve = _solver(model, guidance)

    def values_of(grid: Tensor, batch: DevBatch) -> list[Any]:
        values = plain(metric(solve(batch.noise, batch.cond, grid), batch.reference))
        if not isinstance(values, Sequence):
            return [values]
        if len(values) != len(batch.noise):
            raise ValueError(
                f"metric: expected {len(batch.noise)} values, one a row, got {len(values)}"
            )
        return [plain(value) for value in values]

    return sharded(
        lambda grid, own: [values_of(grid, batch) for batch in own],
        batches,
        costs=costs,
        reduce=lambda batches: reduce([value for values in batches for value in values]),
        group=group,
    )


def _solver(
    model: VelocityModel | GraphSampler, guidance: Tensor | float | None
) -> Callable[[Tensor, Any, Tensor], Tensor]:
    if isinstance(model, GraphSampler):
        replay = model.sample
        return lambda noise, cond, grid: replay(noise, cond, grid, guidance=guidance)
    return lambda noise, cond, grid: sample(model, noise, cond, grid, guidance=guidance)
