"""A distillation step by teacher NFE, the guided rollout in it, and MeanFlow's derivative instead.

test_training   an update: the teacher's guided rollout, the student's forward and backward and a
                fused AdamW, on a ragged padded batch. NFE 0 is an update on a rollout that is
                already there: the student's part alone, which costs what flow matching does. An
                error is that of this part's gradient, relative RMS, against float32
test_rollout    the rollout alone, padded and packed, in FP8; the errors are those of the shortest
                rows against their float32 rollouts alone
test_jvp        updates of IntMeanFlow and MeanFlow at equal batch in float32, which derivatives
                want: ours takes the derivative apart, the published one records it, which is
                what MeanFlow's gradients are compared with, on the same draws

"bytes_held" is the most that a step holds beyond weights and optimizer, on a CUDA device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.contest import Conditions, Contest, Gate, Row, Unavailable
from benchmarks.distillation import published
from benchmarks.plain import plain, plainly
from benchmarks.timing import Ceilings, Run
from benchmarks.updates import GUIDANCE, Trained, draw, peak_bytes, step, trained
from benchmarks.workload import (
    allowed,
    build,
    error,
    limit,
    ragged_lengths,
    request,
    work,
    worst,
)
from imf_kernels import MeanFlow, Teacher
from imf_kernels.models import DiT
from imf_kernels.ops.fp8_linear import runs_on

FP8_ERROR = 0.05
CHECKED = 2
"""Rows whose rollouts are compared with float32's."""
SPAN = (3.0, 30.0)
"""Seconds of the shortest and the longest row."""


def training_rows(conditions: Conditions) -> list[Row]:
    def row(nfe: int, checkpointing: bool, **told: Any) -> Row:
        shape = {"model": "f5_base", "nfe": nfe, "frames": 9600, "checkpointing": checkpointing}
        return conditions.row(**shape | told)

    if conditions.tiny:
        return [row(2, True, model="tiny", frames=60)]
    if conditions.selection == "cpu":
        return [row(nfe, False, frames=200, depth=2) for nfe in (0, 2, 8)]
    if conditions.selection == "gpu":
        return [row(nfe, False) for nfe in (0, 8, 2)]
    return [row(nfe, kept) for kept in (False, True) for nfe in (0, 2, 4, 8, 16)]


def rollout_rows(conditions: Conditions) -> list[Row]:
    def row(nfe: int, **told: Any) -> Row:
        shape = {"model": "f5_base", "nfe": nfe, "guidance": True, "frames": 38400}
        return conditions.row(**shape | told)

    if conditions.tiny:
        return [row(2, model="tiny", frames=60)]
    if conditions.selection == "cpu":
        return [row(2, frames=400, depth=2)]
    return [row(nfe) for nfe in ((8,) if conditions.selection == "gpu" else (8, 2, 16))]


def jvp_rows(conditions: Conditions) -> list[Row]:
    def row(batch: int, **told: Any) -> Row:
        shape = {"model": "f5_base", "nfe": 8, "batch": batch, "frames": 960, "jvp": True}
        return conditions.row(**shape | {"dtype": "float32"} | told)

    if conditions.tiny:
        return [row(2, model="tiny", nfe=2, frames=40)]
    if conditions.selection == "cpu":
        return [row(1, frames=150, depth=2)]
    return [row(batch) for batch in (1, 4)]  # as published 12 GiB a row


def span(conditions: Conditions, rate: float) -> tuple[int, int]:
    """Frames of the shortest and the longest row."""
    scale = 1.0 if conditions.selection in ("gpu", "full") else 0.05
    shortest, longest = (round(scale * seconds * rate) for seconds in SPAN)
    return shortest, longest


@functools.lru_cache(maxsize=1)
def model_of(
    name: str, device: torch.device, dtype: torch.dtype, depth: int | None
) -> tuple[DiT, float]:
    return build(name, device, dtype, depth)


@pytest.mark.rows(of=training_rows)
def test_training(row: Row, contest: Contest) -> None:
    conditions, device = contest.conditions, contest.device
    model, rate = model_of(row["model"], device, conditions.dtype, row.get("depth"))
    lengths = ragged_lengths(row["frames"], *span(conditions, rate))
    kept = row["checkpointing"]
    with torch.enable_grad():
        drawn = draw(model, lengths)
        exact = trained(model, True, fused=False)
        exact.student.float()
        truth = plainly(exact.gradient)(exact.loss(0, *drawn))
        del exact
        twin = trained(model, kept, fused=False)
        off = error(plainly(twin.gradient)(twin.loss(0, *drawn)), truth)
        del twin

        def enter(name: str, role: str, make: Callable[[], Trained]) -> None:
            wrapped: Any = (lambda run: run) if role == "ours" else plainly
            bound = max(FP8_ERROR, allowed(off)) if role == "baseline" else allowed(off)
            errors = []

            def update() -> Run:
                it = make()
                errors.append(
                    error(wrapped(it.gradient)(it.loss(0, *drawn)), truth)
                )  # updates move weights
                return wrapped(step(it.student, it.loss(row["nfe"], *drawn)))

            contest.enter(name, update, lambda _: (errors[0], bound), role=role)
            if name in contest.contenders:
                held = peak_bytes(contest.contenders[name].run, device)
                contest.tell(name, bytes_held=held)

        def compiled() -> Trained:
            if conditions.selection != "full":
                raise Unavailable("compilation takes minutes (full selection)")
            return trained(model, kept, fused=False, compiled=True)

        enter("ours", "ours", lambda: trained(model, kept))
        enter("plain", "baseline", lambda: trained(model, kept, fused=False))
        enter("torch.compile", "peer", compiled)
        for each in contest.contenders.values():
            each.told |= {"rows": len(lengths), "padded_frames": len(lengths) * max(lengths)}
        contest.time()


class Batch(NamedTuple):
    """Rows with intervals of their own, ready to be integrated."""

    z: Tensor
    t: Tensor
    r: Tensor
    given: dict[str, Tensor]

    @classmethod
    def draw(cls, model: DiT, lengths: list[int]) -> Batch:
        prompt = min(lengths) // 4
        z, given = request(model, len(lengths), max(lengths), prompt, lengths)
        t, length = (torch.rand(2, len(lengths), device=z.device) / 2).unbind()
        return cls(z, t, t + length, given)

    def row(self, i: int) -> Batch:
        """A row alone, without padding."""
        at, frames = slice(i, i + 1), int(self.given["lengths"][i])
        given = {name: value[at] for name, value in self.given.items()}
        given["prompt"] = given["prompt"][:, :frames]
        return Batch(self.z[at, :frames].contiguous(), self.t[at], self.r[at], given)

    def integrate(self, model: Any, nfe: int, packed: bool = False) -> Callable[[], Tensor]:
        teacher = Teacher(model, GUIDANCE)
        cond = teacher.prepare(**self.given, packed=packed)
        return lambda: teacher.integrate(self.z, self.t, self.r, nfe, cond).displacement


@pytest.mark.rows(of=rollout_rows)
def test_rollout(row: Row, contest: Contest, ceilings: Ceilings) -> None:
    conditions, device, nfe = contest.conditions, contest.device, row["nfe"]
    model, rate = model_of(row["model"], device, conditions.dtype, row.get("depth"))
    lengths = ragged_lengths(row["frames"], *span(conditions, rate))
    batch = Batch.draw(model, lengths)
    checked = sorted(range(len(lengths)), key=lambda i: lengths[i])[:CHECKED]
    exact, twin = plain(model).float(), plain(model)
    truths = {i: plainly(batch.row(i).integrate(exact, nfe))() for i in checked}
    del exact
    off = {i: error(plainly(batch.row(i).integrate(twin, nfe))(), truths[i]) for i in checked}

    def gate(least: float = 0.0) -> Gate:
        def farthest(displacement: Tensor) -> tuple[float, float]:
            errors = [error(displacement[i, : lengths[i]][None], truths[i]) for i in checked]
            return worst(errors, [max(least, allowed(off[i])) for i in checked])

        return farthest

    def fp8() -> Run:
        if not (runs_on(device) or conditions.tiny):
            raise Unavailable("the device has no products in FP8")
        return batch.integrate(model.fp8(), nfe, packed=True)

    def compiled() -> Run:
        if conditions.selection != "full":
            raise Unavailable("compilation takes minutes (full selection)")
        return plainly(batch.integrate(torch.compile(twin, dynamic=False), nfe))

    flops, nbytes = work(model, 2 * lengths, nfe)
    shape = {"rows": len(lengths), "padded_frames": len(lengths) * max(lengths)}
    told = shape | {"flops": flops, "floor_seconds": limit(flops, nbytes, ceilings)}
    contest.enter("ours", lambda: batch.integrate(model, nfe), gate(), role="ours", **told)
    packed = functools.partial(batch.integrate, model, nfe, packed=True)
    contest.enter("ours, packed", packed, gate(), role="ours", **told)
    contest.enter("ours, packed, fp8", fp8, gate(FP8_ERROR), role="ours", **shape)
    baseline = functools.partial(plainly, batch.integrate(twin, nfe))
    contest.enter("plain", baseline, gate(FP8_ERROR), role="baseline", **told)
    contest.enter("torch.compile", compiled, gate(), **told)
    contest.time()


@pytest.mark.rows(of=jvp_rows)
def test_jvp(row: Row, contest: Contest) -> None:
    device, nfe = contest.device, row["nfe"]
    model, _ = model_of(row["model"], device, torch.float32, row.get("depth"))
    with torch.enable_grad():
        drawn = batch, _ = draw(model, [row["frames"]] * row["batch"])
        it, twin = trained(model, False), trained(model, False, fused=False)

        def mean_flow(derivative: str) -> Callable[[], Tensor]:
            teacher = Teacher(it.teacher, GUIDANCE)
            objective = MeanFlow(teacher, derivative=derivative, adaptive=None, region="all")
            return lambda: objective(it.called, batch)[0]

        recorded = functools.partial(published, it, batch)
        truth = gradient(it, recorded)
        plain_truth = plainly(gradient)(twin, twin.loss(nfe, *drawn))
        del twin
        losses = {
            "ours, IntMeanFlow": ("ours", it.loss(nfe, *drawn), plain_truth, 1e-4),
            "ours, jvp": ("ours", mean_flow("jvp"), truth, 1e-3),
            "ours, difference": ("ours", mean_flow("difference"), truth, FP8_ERROR),
            "jvp as published": ("baseline", recorded, truth, 1e-3),
        }
        errors = {  # of all, before weights move
            name: error(gradient(it, loss), want) for name, (_, loss, want, _) in losses.items()
        }
        for name, (role, loss, _, bound) in losses.items():
            update = functools.partial(step, it.student, loss)
            found = errors[name], bound
            contest.enter(name, update, lambda _, found=found: found, role=role)
            if name in contest.contenders:
                held = peak_bytes(contest.contenders[name].run, device)
                contest.tell(name, bytes_held=held)
        contest.time()


def gradient(it: Trained, loss: Callable[[], Tensor]) -> Tensor:
    """On draws that are the same every time."""
    with torch.no_grad():
        loss()  # what a first call draws besides
    torch.manual_seed(0)
    return it.gradient(loss)
