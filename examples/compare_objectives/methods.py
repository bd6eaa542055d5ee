"""Every objective as it is compared: its settings and why.

The settings are those of `python -m examples.compare_objectives --sweep`, which tries the
alternatives beside them on the development split, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from examples.compare_objectives.training import Objective
from examples.quickstart.experiment import GUIDANCE
from examples.quickstart.model import Token2Mel
from imf_kernels.objectives import (
    Batch,
    DSFlow,
    Intervals,
    IntMeanFlow,
    LogitNormal,
    MeanFlow,
    RolloutCache,
    SplitMeanFlow,
    TeacherRollout,
)
from imf_kernels.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a student is made, trained and kept.

    Attributes:
        build: `build(teacher, updates, generator, **options)` is the objective.
        options: Of `build`.
        student: Options of the teacher's `student`.
        lr: Learning rate, constant after warm-up.
        ema: Decay of the weights' average; None: no average.
    """

    build: Callable[..., Objective]
    options: Mapping[str, Any] = field(default_factory=dict)
    student: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 1e-3
    ema: float | None = 0.98

    def but(self, **changes: Any) -> Method:
        """With other fields, or other options."""
        fields = {name: changes.pop(name) for name in ("student", "lr", "ema") if name in changes}
        return replace(self, **fields, options={**self.options, **changes})

    def make(
        self, teacher: Token2Mel, updates: int, generator: torch.Generator
    ) -> tuple[Token2Mel, Objective]:
        """A student of the teacher, and its objective."""
        guided = Teacher(teacher, guidance=GUIDANCE)
        objective = self.build(guided, updates, generator, **self.options)
        return teacher.student(**self.student), objective

    @property
    def described(self) -> dict[str, Any]:
        """For the results."""
        return {**self.options, **self.student, "lr": self.lr, "ema": self.ema}


def int_mean_flow(
    teacher: Teacher,
    updates: int,
    generator: torch.Generator,
    *,
    reuse: int,
    interval: Mapping[str, float],
    **options: Any,
) -> IntMeanFlow:
    """Each rollout serves `reuse` updates."""
    cache = RolloutCache(max(updates // reuse, 1), generator=generator) if reuse > 1 else None
    return IntMeanFlow(
        teacher,
        intervals=Intervals(**interval),
        region="all",
        cache=cache,
        generator=generator,
        **options,
    )


def split_mean_flow(
    teacher: Teacher, updates: int, generator: torch.Generator, *, interval: Mapping[str, float]
) -> SplitMeanFlow:
    intervals = Intervals(**interval)
    return SplitMeanFlow(teacher, intervals=intervals, region="all", generator=generator)


class CachedDSFlow(DSFlow):
    """DSFlow whose rollouts are dealt again, as IntMeanFlow's are."""

    cache: RolloutCache | None = None

    def rollout(self, batch: Batch) -> TeacherRollout:
        if self.cache is None:
            return super().rollout(batch)
        if self.cache.wants_new():
            self.cache.add(super().rollout(batch))
        return self.cache.deal()


def ds_flow(
    teacher: Teacher, updates: int, generator: torch.Generator, *, reuse: int, **options: Any
) -> DSFlow:
    """Each rollout serves `reuse` updates."""
    objective = CachedDSFlow(teacher, region="all", generator=generator, **options)
    if reuse > 1:
        objective.cache = RolloutCache(max(updates // reuse, 1), generator=generator)
    return objective


def mean_flow(
    teacher: Teacher,
    updates: int,
    generator: torch.Generator,
    *,
    interval: Mapping[str, float],
    **options: Any,
) -> MeanFlow:
    intervals = LogitNormal(**interval)
    return MeanFlow(teacher, intervals=intervals, region="all", generator=generator, **options)


METHODS = {
    # All: the quickstart's learning rate; an average over some 50 updates in place of its decay.
    # The quickstart's: 16 guided sub-steps from noise, whose 136 pairs of times serve 16 updates.
    "int_mean_flow": Method(
        build=int_mean_flow,
        options={
            "nfe": 16,
            "spacing": "jitter",
            "source": "noise",
            "targets": 1,
            "interval": {"full": 0.2},
            "reuse": 16,
        },
    ),
    # The paper's share of rows with r = t; twice the learning rate was worse.
    "split_mean_flow": Method(build=split_mean_flow, options={"interval": {"boundary": 0.5}}),
    # The paper's weights and step counts. Rollouts, and the updates that each serves, as
    # IntMeanFlow's: both ask the teacher equally often.
    "ds_flow": Method(
        build=ds_flow, options={"nfe": 16, "counts": (1, 2, 4), "endpoint": 0.7, "reuse": 16}
    ),
    # The guided teacher's velocity in place of the data's. Half of the rows have r = t, not the .75
    # of training from scratch; a quarter was worse. The difference takes .7 of the JVP's time.
    "mean_flow": Method(
        build=mean_flow,
        options={"derivative": "difference", "interval": {"boundary": 0.5}, "adaptive": 0.01},
    ),
}

SWEEP: dict[str, dict[str, dict[str, Any]]] = {
    "int_mean_flow": {
        "lr 5e-4": {"lr": 5e-4},
        "lr 2e-3": {"lr": 2e-3},
        "ema .99": {"ema": 0.99},
        "reuse 8": {"reuse": 8},
    },
    "split_mean_flow": {
        "lr 5e-4": {"lr": 5e-4},
        "lr 2e-3": {"lr": 2e-3},
        "ema .99": {"ema": 0.99},
        "boundary .75": {"interval": {"boundary": 0.75}},
        "boundary .25": {"interval": {"boundary": 0.25}},
        "full .2": {"interval": {"boundary": 0.5, "full": 0.2}},
    },
    "ds_flow": {
        "lr 5e-4": {"lr": 5e-4},
        "lr 2e-3": {"lr": 2e-3},
        "ema .99": {"ema": 0.99},
        "endpoint .9": {"endpoint": 0.9},
    },
    "mean_flow": {
        "lr 5e-4": {"lr": 5e-4},
        "lr 2e-3": {"lr": 2e-3},
        "boundary .75": {"interval": {"boundary": 0.75}},
        "ema .99": {"ema": 0.99},
        "boundary .25": {"interval": {"boundary": 0.25}},
        "unweighted": {"adaptive": None},
        "jvp": {"derivative": "jvp"},
    },
}
"""What the sweep tries beside each objective's settings, one at a time."""
