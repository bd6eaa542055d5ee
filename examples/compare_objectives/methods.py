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
from imf_kernels.models import StepTokenDiT
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
        form: `form(teacher, **student)` is a student.
        student: Options of `form`.
        lr: Learning rate after warm-up.
        decay: Of the learning rate, over the updates; "constant" makes every moment an end.
        ema: Decay of the weights' average; None: no average.
        ramp: See `train`.
    """

    build: Callable[..., Objective]
    options: Mapping[str, Any] = field(default_factory=dict)
    form: Callable[..., Token2Mel] = Token2Mel.student
    student: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 1e-3
    decay: str = "constant"
    ema: float | None = 0.98
    ramp: float = 10.0

    def but(self, **changes: Any) -> Method:
        """With other training, or other options of the objective or (`student`) the student."""
        own = ("lr", "decay", "ema", "ramp")
        fields = {name: changes.pop(name) for name in own if name in changes}
        student = {**self.student, **changes.pop("student", {})}
        return replace(self, **fields, student=student, options={**self.options, **changes})

    def student_of(self, teacher: Token2Mel) -> Token2Mel:
        return self.form(teacher, **self.student)

    def objective_of(
        self, teacher: Token2Mel, updates: int, generator: torch.Generator
    ) -> Objective:
        guided = Teacher(teacher, guidance=GUIDANCE)
        return self.build(guided, updates, generator, **self.options)

    @property
    def described(self) -> dict[str, Any]:
        """For the results."""
        training = {"lr": self.lr, "decay": self.decay, "ema": self.ema}
        if self.ramp != Method.ramp:
            training["ramp"] = self.ramp
        return {**self.options, **self.student, **training}


def with_step_tokens(teacher: Token2Mel, **options: Any) -> Token2Mel:
    """A student without time conditioning, DSFlow's own form; options of `StepTokenDiT.of`."""
    student = teacher.student()
    student.estimator = StepTokenDiT.of(teacher.estimator, **options)
    return student


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
    intervals = (LogitNormal if "mean" in interval else Intervals)(**interval)
    return MeanFlow(teacher, intervals=intervals, region="all", generator=generator, **options)


METHODS = {
    # All: an average of the last ninth of the updates in place of a decay; the sweep's rates.
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
        lr=2.5e-4,
    ),
    # The paper's share of rows with r = t. A fifth of rows over [0, 1] was nearer at NFE 1 alone.
    "split_mean_flow": Method(
        build=split_mean_flow, options={"interval": {"boundary": 0.5}}, lr=2.5e-4
    ),
    # The paper's weights and step counts. Rollouts, and the updates that each serves, as
    # IntMeanFlow's: both ask the teacher equally often.
    "ds_flow": Method(
        build=ds_flow,
        options={"nfe": 16, "counts": (1, 2, 4), "endpoint": 0.7, "reuse": 16},
        lr=2.5e-4,
    ),
    # The same for the paper's student, which has no time conditioning: it begins with the teacher's
    # modulations at one time. Its steps are at 0 to .75; from .5 the first is to be learnt anew.
    "ds_flow_tokens": Method(
        build=ds_flow,
        options={
            "nfe": 16,
            "counts": (1, 2, 4),
            "endpoint": 0.7,
            "reuse": 16,
            "steps": "steps",
        },
        form=with_step_tokens,
        student={"tokens": 3, "time": 0.25},
        lr=5e-4,
    ),
    # The guided teacher's velocity in place of the data's. Half of the rows have r = t, not the .75
    # of training from scratch. The difference is wide: for t <= .5 this
    # teacher's dv/dt has an rms of 2.4 to 3.4 (a JVP and a difference over 1e-4 agree on it), but
    # of .6 to .8 over .05: the rest are ripples of the embedding of 1000 t. With them the target
    # over [t, 1] is 1.7 to 3 away from the mean velocity, v itself .3; a student is worse at NFE
    # 1 than an untrained one. Over .2 it ends the sweep 3 % nearer still, but with more bias.
    "mean_flow": Method(
        build=mean_flow,
        options={
            "derivative": "difference",
            "step": 0.1,
            "interval": {"mean": 0.4, "std": 1.0, "boundary": 0.5},
            "adaptive": 0.01,
        },
    ),
    # The derivative itself, by forward-mode AD.
    "mean_flow_jvp": Method(
        build=mean_flow,
        options={
            "derivative": "jvp",
            "interval": {"mean": 0.4, "std": 1.0, "boundary": 0.5},
            "adaptive": 0.01,
        },
        lr=2.5e-4,
    ),
}

SWEEP: dict[str, dict[str, dict[str, Any]]] = {
    "int_mean_flow": {
        "lr 1.25e-4": {"lr": 1.25e-4},
        "lr 5e-4": {"lr": 5e-4},
        "lr 1e-3": {"lr": 1e-3},
        "lr 2e-3": {"lr": 2e-3},
        "as the quickstart": {"lr": 1e-3, "decay": "cosine", "ema": None},
    },
    "split_mean_flow": {
        "lr 5e-4": {"lr": 5e-4},
        "full .2": {"interval": {"boundary": 0.5, "full": 0.2}},
        "boundary .75": {"interval": {"boundary": 0.75}},
        "lr 1.25e-4": {"lr": 1.25e-4},
        "lr 1e-3": {"lr": 1e-3},
    },
    "ds_flow": {
        "lr 1.25e-4": {"lr": 1.25e-4},
        "lr 5e-4": {"lr": 5e-4},
        "lr 1e-3": {"lr": 1e-3},
    },
    "ds_flow_tokens": {
        "lr 2.5e-4": {"lr": 2.5e-4},
        "time .5": {"student": {"time": 0.5}},
        "time 0": {"student": {"time": 0.0}},
        "time 0, lr 1e-3": {"student": {"time": 0.0}, "lr": 1e-3},
        "time 0, lr 2e-3": {"student": {"time": 0.0}, "lr": 2e-3},
        "1 token": {"student": {"tokens": 1}},
    },
    "mean_flow": {
        "step .2": {"step": 0.2},
        "lr 5e-4": {"lr": 5e-4},
        "lr 2e-3": {"lr": 2e-3},
        "step 1e-4": {"step": 1e-4},
        "step .05": {"step": 0.05},
        "uniform": {"interval": {"boundary": 0.5, "full": 0.2}},
        "boundary .75": {"interval": {"mean": 0.4, "std": 1.0, "boundary": 0.75}},
        "unweighted": {"adaptive": None},
    },
    "mean_flow_jvp": {
        "lr 1.25e-4": {"lr": 1.25e-4},
        "lr 5e-4": {"lr": 5e-4},
        "lr 1e-3": {"lr": 1e-3},
        "lr 2e-3": {"lr": 2e-3},
    },
}
"""What the sweep tries beside each objective's settings, one at a time."""
