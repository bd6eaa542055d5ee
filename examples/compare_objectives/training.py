"""A training loop whose every moment is a finished student: constant rate, averaged weights.

A schedule that decays to its end would favour whichever budget it ends with; so one run of an
objective is measured after as many updates as the others, and after as many seconds. Whether such
a schedule would do better is a question for the sweep.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from examples.quickstart.model import Token2Mel
from imf_kernels.distill.optimization import adamw, schedule
from imf_kernels.objectives import Batch

WARMUP = 20
CLIP = 1.0

Objective = Callable[[Any, Batch], tuple[Tensor, Mapping[str, Tensor]]]


class Snapshot(NamedTuple):
    """A student after so many updates and seconds of CPU time, and the budgets that end there."""

    budgets: tuple[str, ...]
    updates: int
    seconds: float
    weights: dict[str, Tensor]

    @property
    def facts(self) -> dict[str, Any]:
        """All but the weights."""
        return {"budgets": self.budgets, "updates": self.updates, "seconds": self.seconds}


def train(
    student: Token2Mel,
    objective: Objective,
    batches: Iterator[Batch],
    *,
    lr: float,
    decay: str = "constant",
    ema: float | None,
    ramp: float,
    updates: int,
    seconds: float | None = None,
) -> list[Snapshot]:
    """Train until both budgets are used, and return the student at their ends and on the way.

    Args:
        student: Trained in place; the snapshots hold its averaged weights.
        objective: `loss, info = objective(student, batch)`.
        batches: Endless.
        lr: Learning rate after a linear warm-up.
        decay: Of the learning rate, over the updates: "constant", "cosine" or "linear".
        ema: Decay of the weights' average; None: no average.
        ramp: After k updates the decay is at most (1 + k) / (ramp + k): the average is over about
            the last 1 / (ramp - 1) of the updates, however many there are.
        updates: The budget "updates". A quarter and a half of it are snapshots too.
        seconds: The budget "seconds", of CPU time; None: what the updates take. Snapshots take
            none.
    """
    student.estimator.fuse_weights()
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = adamw(student, lr, weight_decay=0.01)
    averaged = AveragedModel(student, multi_avg_fn=_average(ema or 0.0, ramp))
    student.train()
    snapshots: list[Snapshot] = []
    left, done, taken = {"updates", "seconds"}, 0, 0.0
    while left:
        start = time.process_time()
        optimizer.param_groups[0]["lr"] = lr * schedule(min(done, updates), updates, WARMUP, decay)
        loss, _ = objective(student, next(batches))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP, error_if_nonfinite=True)
        optimizer.step()
        averaged.update_parameters(student)
        taken += time.process_time() - start
        done += 1

        enough = done >= updates
        used = {"updates": enough, "seconds": enough if seconds is None else taken >= seconds}
        ended = {budget for budget in left if used[budget]}
        left -= ended
        if ended or done in (updates // 4, updates // 2):
            weights = {k: v.clone() for k, v in averaged.module.state_dict().items()}
            snapshots.append(Snapshot(tuple(sorted(ended)), done, taken, weights))
    return snapshots


def _average(decay: float, ramp: float) -> Callable[[list[Tensor], list[Tensor], Any], None]:
    """An exponential moving average that forgets its first updates soon."""

    def update(averages: list[Tensor], weights: list[Tensor], count: Any) -> None:
        share = min(decay, (1 + int(count)) / (ramp + int(count)))
        torch._foreach_lerp_(averages, weights, 1 - share)

    return update


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that a call holds on the CPU at once, beyond what is there before it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    recorded = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in recorded if e.name() == "[memory]")
    return max(itertools.accumulate(nbytes for _, nbytes in changes))
