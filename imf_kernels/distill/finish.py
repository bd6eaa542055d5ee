"""After training: the student as a plain model, its searched grids, its files."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from imf_kernels import grids, o3s
from imf_kernels.distill import schema
from imf_kernels.distill.build import Run, student_of, teacher_model
from imf_kernels.distill.config import O3SSection
from imf_kernels.distill.lora import adapters, merge_lora
from imf_kernels.distill.parallel import gathered
from imf_kernels.files import replacing
from imf_kernels.models import CausalUNet, DiT, StepTokenDiT, checkpoints, save_student
from imf_kernels.objectives.batch import Batch

Reduce = Callable[[list[Any]], float]


def whole(run: Run) -> Any:
    """The trained student without shards and adapters, in eval mode, on every rank."""
    student = run.student
    if any(hasattr(value, "full_tensor") for value in student.state_dict().values()):
        state = {name: gathered(value) for name, value in student.state_dict().items()}
        student = student_of(run.config.model, teacher_model(run.config.model))
        student.load_state_dict(state)
        student.to(run.accelerator.device)
    return merge_lora(student) if adapters(student) else student.eval()


def search_grids(run: Run, student: Any) -> dict[int, Tensor]:
    """The best grid of each number of steps, on the held-out utterances, by all ranks.

    `folder/o3s` holds the searches and every evaluation: one that was broken off goes on.
    """
    section = run.config.o3s
    if section is None:
        return {}
    score, reduce = _judged(section)
    said = section.metric if isinstance(section.metric, str) else schema.name_of(section.metric)
    names = [name for batch in run.held_out for name in batch.names]
    found = {}
    for nfe in section.nfe:
        told = {} if run.extra is None else run.extra(nfe)
        batches = [
            replace(batch, conditions={**batch.conditions, **told}) for batch in run.held_out
        ]

        def compared(mel: Tensor, batch: Batch, batches: list[Batch] = batches) -> list[Any]:
            """The scores of the rows' frames that count."""
            index = next(i for i, other in enumerate(batches) if other is batch)
            fine = section.reference == "teacher"
            goal = run.solves.of(run.held_out[index], index) if fine else batch.x1
            rows = zip(mel, goal, batch.counted("span"), batch.names, strict=True)
            return [
                score(row[counted].cpu(), wanted[counted].cpu(), name)
                for row, wanted, counted, name in rows
            ]

        result = o3s.find_grid(
            student,
            batches,
            compared,
            nfe,
            higher_is_better=section.higher_is_better,
            folder=run.config.folder / "o3s",
            name=f"{said}@{section.reference}",
            seed=run.config.training.seed,
            settings={
                "over": section.over,
                "utterances": names,
                "solves": run.solves.of_what if section.reference == "teacher" else None,
            },
            reduce=reduce,
            **run.config.search_options(),
        )
        found[nfe] = result.grid
        if run.accelerator.is_main_process:
            print(
                f"o3s, nfe {nfe}: {result.evaluations[0].value:.4g} to {result.value:.4g} on "
                f"{[round(time, 3) for time in result.best.grid]} "
                f"({len(result.evaluations)} evaluations, {result.stopped})",
                flush=True,
            )
    return found


def _judged(section: O3SSection) -> tuple[Callable[[Tensor, Tensor, str], Any], Reduce]:
    """What is made of an utterance's mels on the rank that has them, and of that of all."""
    metric = section.metric
    if isinstance(metric, str):
        return _squares, _root_mean
    try:
        named = "names" in inspect.signature(metric).parameters
    except (TypeError, ValueError):  # of another language's functions
        named = False

    def judge(utterances: list[Any]) -> float:
        mels, goals, names = map(list, zip(*utterances, strict=True))
        return float(metric(mels, goals, **({"names": names} if named else {})))

    if section.over == "utterances":
        return lambda *utterance: judge([utterance]), o3s.mean
    return lambda *utterance: utterance, judge


def _squares(mel: Tensor, goal: Tensor, name: str) -> tuple[float, int]:
    return float((mel - goal).double().square().sum()), mel.numel()


def _root_mean(squares: list[tuple[float, int]]) -> float:
    sums, counts = zip(*squares, strict=True)
    return math.sqrt(math.fsum(sums) / sum(counts))


def write(run: Run, student: Any, found: dict[int, Tensor]) -> None:
    """The student and its side file; of your own model a safetensors of its state dict, of one with
    step tokens what it saves, and beside either its grid."""
    said = run.config.output
    path = said.path
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = found.get(said.nfe, grids.make(said.grid, said.nfe))
    if isinstance(student, StepTokenDiT):
        student.save(path)
    elif isinstance(student, DiT | CausalUNet):
        with schema.naming("output", ("like",)):
            save_student(
                student, path, like=said.like, grid=grid, guidance=run.config.model.guidance
            )
        return
    else:
        state = {name: value.cpu().contiguous() for name, value in student.state_dict().items()}
        checkpoints.write(path, state)
    with replacing(path.with_suffix(".grid.json")) as temporary:
        temporary.write_text(json.dumps(grid.tolist()))
