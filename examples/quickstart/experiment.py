"""The method, step by step: distil the teacher, search the grid, measure everything."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from examples.quickstart import metrics
from examples.quickstart.corpus import Utterance
from examples.quickstart.data import training_batches
from examples.quickstart.model import Token2Mel
from examples.quickstart.split import Split
from imf_kernels import grids, o3s
from imf_kernels.distill import distill
from imf_kernels.objectives import Intervals, IntMeanFlow, RolloutCache
from imf_kernels.teacher import Teacher

GUIDANCE = 1.3
FINE = 32
"""Steps of the teacher's reference solve."""

BATCH_SIZE = 16
TEACHER_NFE = 16
UPDATES = 480
UPDATES_PER_ROLLOUT = 16
LEARNING_RATE = 5e-4
FULL_SHARE = 0.2

Progress = Callable[[int, int], None]
"""Called with what is done and what there is to do."""


def plan_updates(
    teacher: Token2Mel, utterances: Sequence[Utterance], seconds: float, most: int
) -> int:
    """How many updates fit into `seconds` on this machine, at most `most`.

    Below `most` the run depends on the machine's speed; at it, on the seed alone.
    """
    generator = torch.Generator().manual_seed(0)
    objective = _objective(teacher, 1, generator)
    by_length = sorted(utterances, key=lambda u: len(u.mel))
    middle = max((len(by_length) - BATCH_SIZE) // 2, 0)
    typical = by_length[middle : middle + BATCH_SIZE]
    batch = next(training_batches(typical, BATCH_SIZE, generator, _device(teacher)))
    student = teacher.student()
    rollout = objective.rollout(batch)
    per_rollout = min(_seconds(teacher, lambda: objective.rollout(batch)) for _ in range(2))
    per_update = min(
        _seconds(teacher, lambda: objective.loss(student, rollout)[0].backward()) for _ in range(3)
    )
    per_update = 1.1 * per_update + per_rollout / UPDATES_PER_ROLLOUT  # 10 % for the optimizer
    return max(min(int(seconds / per_update), most), 1)


def _seconds(model: Token2Mel, run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if _device(model).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def distil_student(
    teacher: Token2Mel,
    utterances: Sequence[Utterance],
    updates: int,
    seed: int,
    progress: Progress,
) -> Token2Mel:
    """Cached rollouts of the guided teacher from noise; random pairs of their times as targets."""
    generator = torch.Generator().manual_seed(seed)
    objective = _objective(teacher, max(updates // UPDATES_PER_ROLLOUT, 1), generator)
    return distill(
        teacher.student(),
        objective,
        training_batches(utterances, BATCH_SIZE, generator, _device(teacher)),
        updates,
        lr=LEARNING_RATE,
        warmup=min(20, updates // 4),
        callback=lambda update, _: progress(update + 1, updates),
    )


def _objective(teacher: Token2Mel, rollouts: int, generator: torch.Generator) -> IntMeanFlow:
    return IntMeanFlow(
        Teacher(teacher, guidance=GUIDANCE),
        nfe=TEACHER_NFE,
        spacing="jitter",
        source="noise",
        intervals=Intervals(full=FULL_SHARE),
        region="all",
        cache=RolloutCache(rollouts, generator=generator),
        generator=generator,
    )


def _device(model: Token2Mel) -> torch.device:
    return model.estimator.proj_out.weight.device


def search_grid(
    model: Token2Mel,
    dev: Split,
    reference: Sequence[Tensor],
    nfe: int,
    guidance: float | None = None,
) -> o3s.SearchResult:
    """O3S on the development split: the distance to the teacher's fine solve, lower is better."""

    def distance(grid: Tensor) -> float:
        return metrics.to_teacher(dev.scored(dev.solve(model, grid, guidance)), reference)

    return o3s.search(
        distance, nfe, higher_is_better=False, tolerance=0.1, min_gain=5e-4, budget=60
    )


def measure(
    teacher: Token2Mel,
    student: Token2Mel,
    test: Split,
    searched: dict[tuple[str, int], Tensor],
    seed: int,
    progress: Progress,
) -> tuple[list[dict[str, Any]], dict[str, list[Tensor]]]:
    """A row per model, grid and NFE on the test split, and the mels by "model nfe grid"."""
    plan: list[tuple[str, int, str, Tensor]] = []
    for name, steps in (
        ("teacher", (FINE, 8, 4, 3, 2, 1)),
        ("teacher_unguided", (FINE, 8, 4, 3, 2, 1)),
        ("student", (8, 4, 3, 2, 1)),
    ):
        plan += [(name, nfe, "uniform", grids.uniform(nfe)) for nfe in steps]
    plan += [("teacher", nfe, "sway", grids.sway(nfe)) for nfe in (8, 4)]
    plan += [(name, nfe, "o3s", grid) for (name, nfe), grid in searched.items()]

    truth = test.truth
    models = {"teacher": teacher, "teacher_unguided": teacher, "student": student}
    rows, mels = [], {}
    test.solve(teacher, grids.uniform(1))  # warm-up of the machine, not measured
    for done, (name, nfe, kind, grid) in enumerate(plan):
        solved, speed = test.timed_solve(
            models[name],
            grid,
            GUIDANCE if name == "teacher" else None,
            repeats=2 if nfe <= 4 else 1,
        )
        mels[f"{name} {nfe} {kind}"] = solved
        scored = test.scored(solved)
        reference = test.scored(mels[f"teacher {FINE} uniform"])
        rows.append(
            {
                "model": name,
                "nfe": nfe,
                "grid": kind,
                "times": grid.tolist(),
                **numbers(scored, truth, reference, seed),
                "seconds_per_audio_second": speed,
            }
        )
        progress(done + 1, len(plan))
    return rows, mels


def numbers(
    scored: Sequence[Tensor], truth: Sequence[Tensor], reference: Sequence[Tensor], seed: int
) -> dict[str, float]:
    """The five numbers of generated mels; `reference` is the guided teacher's fine solve."""
    return {
        "mcd": metrics.mcd(scored, truth),
        "frechet": metrics.frechet(scored, truth),
        "sharpness": metrics.sharpness(scored, truth),
        "c2st": metrics.c2st(scored, truth, seed=seed),
        "to_teacher": metrics.to_teacher(scored, reference),
    }


def claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the student should reach: each with its value, its limit and whether it holds."""
    table = {(row["model"], row["nfe"], row["grid"]): row for row in rows}

    def value(model: str, nfe: int, key: str) -> float:
        return table[model, nfe, "uniform"][key]

    out = []

    def claim(text: str, got: float, limit: float, *, at_most: bool = False) -> None:
        holds = got <= limit if at_most else got < limit
        out.append({"claim": text, "value": got, "limit": limit, "holds": bool(holds)})

    for nfe, share in ((1, 0.5), (2, 0.65)):
        claim(
            f"distance to the fine solve, student / guided teacher, NFE {nfe}",
            value("student", nfe, "to_teacher") / value("teacher", nfe, "to_teacher"),
            share,
            at_most=True,
        )
    for nfe in (1, 2):
        claim(
            f"Frechet distance, student NFE {nfe} / teacher NFE {FINE}",
            value("student", nfe, "frechet") / value("teacher", FINE, "frechet"),
            1.5,
            at_most=True,
        )
        claim(
            f"C2ST, student against the unguided teacher's, NFE {nfe}",
            value("student", nfe, "c2st"),
            value("teacher_unguided", nfe, "c2st"),
        )
        claim(
            f"sharpness away from 1, student against the unguided teacher's, NFE {nfe}",
            abs(1 - value("student", nfe, "sharpness")),
            abs(1 - value("teacher_unguided", nfe, "sharpness")),
        )
    for nfe in (1, 2, 3, 4, 8):
        key = "seconds_per_audio_second"
        claim(
            f"cost, student against the guided teacher's, NFE {nfe}",
            value("student", nfe, key),
            value("teacher", nfe, key),
        )
    return out
