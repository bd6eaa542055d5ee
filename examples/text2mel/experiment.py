"""The method, step by step: distil the teacher, search the grids, measure everything."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from examples.quickstart import metrics
from examples.quickstart.corpus import Utterance
from examples.quickstart.split import Split
from examples.text2mel.data import TrainingBatches, generator_of
from examples.text2mel.recogniser import Recogniser, accuracy
from imf_kernels import grids, o3s
from imf_kernels.distill import distill
from imf_kernels.models import DiT
from imf_kernels.objectives import Intervals, IntMeanFlow, RolloutCache
from imf_kernels.teacher import Teacher

GUIDANCE = 3.0
FINE = 32
"""Steps of the teacher's reference solve."""
FEW = (4, 3, 2, 1)

BATCH_SIZE = 16
TEACHER_NFE = 16
UPDATES_PER_ROLLOUT = 8
LEARNING_RATE = 1e-3
FULL_SHARE = 0.2
REGIONS = ("all", "span")
"""Where the student's loss counts: in all frames, or in those to generate. Both are tried."""

GATE = 0.8
"""Phoneme accuracy that the teacher must reach at `FINE` steps."""

Progress = Callable[[int, int], None]
"""Called with what is done and what there is to do."""
Key = tuple[str, int, str]
"""Model, NFE and kind of grid."""


class Judge:
    """A split, and all that is measured of mels generated for it; prompts do not count."""

    def __init__(self, split: Split, recogniser: Recogniser, teacher: DiT) -> None:
        self.split, self.recogniser = split, recogniser
        self.fine = split.solve(teacher, grids.uniform(FINE), GUIDANCE)
        self.truth = [u.mel for u in split.utterances]

    def phoneme_accuracy(self, mels: Sequence[Tensor]) -> float:
        phonemes = [u.phonemes for u in self.split.utterances]
        return accuracy(self.recogniser, mels, phonemes, self.split.prompts)

    def to_teacher(self, mels: Sequence[Tensor]) -> float:
        return metrics.to_teacher(self.split.scored(mels), self.split.scored(self.fine))

    def numbers(self, mels: Sequence[Tensor], seed: int) -> dict[str, float]:
        """MCD compares frame by frame: it also counts what is said early or late."""
        scored, truth = self.split.scored(mels), self.split.truth
        return {
            "phonemes": self.phoneme_accuracy(mels),
            "mcd": metrics.mcd(scored, truth),
            "frechet": metrics.frechet(scored, truth),
            "sharpness": metrics.sharpness(scored, truth),
            "c2st": metrics.c2st(scored, truth, seed=seed),
            "to_teacher": self.to_teacher(mels),
        }


def distil_students(
    teacher: DiT, utterances: Sequence[Utterance], updates: int, seed: int, progress: Progress
) -> dict[str, DiT]:
    """A student for each of `REGIONS`, from the same rollouts of the guided teacher from noise.

    The rollouts cover all valid frames, as sampling does, whatever the loss covers.
    """
    rollouts = RolloutCache(max(updates // UPDATES_PER_ROLLOUT, 1), generator=generator_of(seed))
    batches = TrainingBatches(utterances, BATCH_SIZE, seed, teacher.proj_out.weight.device)
    students = {}
    for done, region in enumerate(REGIONS):
        objective = IntMeanFlow(
            Teacher(teacher, guidance=GUIDANCE),
            nfe=TEACHER_NFE,
            spacing="jitter",
            source="noise",
            intervals=Intervals(full=FULL_SHARE),
            region=region,
            cache=rollouts,
            generator=generator_of(seed, region),
        )

        def tick(update: int, _: object, before: int = done * updates) -> None:
            progress(before + update + 1, len(REGIONS) * updates)

        students[region] = distill(
            teacher.student(),
            objective,
            map(batches, itertools.count()),
            updates,
            lr=LEARNING_RATE,
            warmup=min(20, updates // 4),
            callback=tick,
        )
    return students


def search_grid(
    model: DiT, guidance: float | None, nfe: int, kind: str, dev: Judge
) -> o3s.SearchResult:
    """O3S on the development split by one of two metrics.

    "o3s" takes the distance to the teacher's fine solve, which is smooth; "o3s phonemes" phoneme
    accuracy, which is what counts, but a staircase on so few utterances.
    """
    by_distance = kind == "o3s"
    metric = dev.to_teacher if by_distance else dev.phoneme_accuracy
    return o3s.search(
        lambda grid: metric(dev.split.solve(model, grid, guidance)),
        nfe,
        higher_is_better=not by_distance,
        tolerance=0.1,
        min_gain=5e-4,
        budget=40,
    )


def search_grids(
    models: dict[str, DiT], dev: Judge, progress: Progress
) -> dict[Key, o3s.SearchResult]:
    """Every model's grids of more than one step, by both metrics."""
    kinds = ("o3s", "o3s phonemes")
    plan = [(name, nfe, kind) for name in models for nfe in FEW if nfe > 1 for kind in kinds]
    found = {}
    for done, (name, nfe, kind) in enumerate(plan):
        found[name, nfe, kind] = search_grid(models[name], _guidance(name), nfe, kind, dev)
        progress(done + 1, len(plan))
    return found


def measure(
    models: dict[str, DiT],
    searched: dict[Key, Tensor],
    test: Judge,
    seed: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """A row per model, NFE and grid on the test split."""
    plan: dict[Key, Tensor] = {("teacher", FINE, "uniform"): grids.uniform(FINE)}
    for name in models:
        plan |= {(name, nfe, "uniform"): grids.uniform(nfe) for nfe in FEW}
        plan |= {(name, nfe, "sway"): grids.sway(nfe) for nfe in FEW if nfe > 1}
    plan |= searched
    rows = []
    test.split.solve(models["teacher"], grids.uniform(1))  # warm-up of the machine, not measured
    for done, ((name, nfe, kind), grid) in enumerate(plan.items()):
        repeats = 2 if nfe in FEW else 1
        mels, speed = test.split.timed_solve(models[name], grid, _guidance(name), repeats=repeats)
        rows.append(
            {
                "model": name,
                "nfe": nfe,
                "grid": kind,
                "times": grid.tolist(),
                **test.numbers(mels, seed),
                "seconds_per_audio_second": speed,
            }
        )
        progress(done + 1, len(plan))
    return rows


def _guidance(name: str) -> float | None:
    """The teacher is guided; students have its guidance in them."""
    return GUIDANCE if name == "teacher" else None
