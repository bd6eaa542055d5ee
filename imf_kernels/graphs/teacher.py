"""The guided teacher's rollouts through CUDA graphs, for objectives and searches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from imf_kernels import checks
from imf_kernels.graphs import buckets as tiers
from imf_kernels.graphs import requests
from imf_kernels.graphs.buckets import DEFAULT, Bucket
from imf_kernels.graphs.engine import Engine, Fallback, Program, Station, Stats
from imf_kernels.models.conditioning import TensorSpec
from imf_kernels.ops.ragged_copy import Copy
from imf_kernels.solver import solve
from imf_kernels.teacher import Rollout, Steps, Teacher


class GraphTeacher(Teacher):
    """A `Teacher` whose `integrate` is one replay: the doubled forwards of all sub-steps.

    A drop-in for objectives. Each number of sub-steps (and `keep`) is captured once per bucket when
    first needed; intervals, spacing, guidance, lengths and conditioning vary freely. What cannot be
    a replay runs eagerly, counted and warned of once, as in `GraphSampler`; so does everything
    where there is no CUDA.

    Args:
        model, guidance: As for `Teacher`.
        buckets: `(rows, frames)` each, or `(rows, total, frames)`; see `GraphSampler`.
        slots: How many rollouts may be under way at once.
        prepare: What `model.prepare` is given beside its tensors.
    """

    def __init__(
        self,
        model: Any,
        guidance: Tensor | float | None = None,
        buckets: Iterable[tuple[int, ...]] = DEFAULT,
        slots: int = 1,
        *,
        prepare: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model, guidance)
        checks.positive_int("slots", slots)
        guided = self.guidance is not None
        options = prepare or {}
        self._engine = Engine(self.model, buckets, slots, guided, options, prepares=False)

    def with_guidance(self, guidance: Tensor | float | None) -> GraphTeacher:
        """As `Teacher.with_guidance`, on the same graphs.

        Raises:
            ValueError: guidance for one that was made without, or the reverse.
        """
        other = super().with_guidance(guidance)
        if (other.guidance is not None) != self._engine.guided:
            wanted = "w" if self._engine.guided else "None or 1"
            raise ValueError(f"guidance: expected {wanted}, as at construction, got {guidance}")
        return other

    def _rollout(self, z: Tensor, steps: Steps, cond: Any, keep: bool) -> Rollout:
        engine, nfe = self._engine, len(steps.dt)
        engine.check([("z", z)], cond)
        lengths = [z.shape[1]] * z.shape[0]
        requests.check_cond(cond, self.model.specs, lengths, engine.guided)
        if not engine.stations:
            engine.count(eager=1)
            return super()._rollout(z, steps, cond, keep)
        total = requests.total_frames(lengths, engine.guided, cond)
        reason = engine.why_eager(lengths, total, cond)
        if z.dtype != torch.float32:
            reason = Fallback("dtype", f"{z.dtype} instead of torch.float32")
        if reason is None:
            bucket = tiers.choose(engine.buckets, lengths, total)
            assert bucket is not None
            with engine.station() as station:
                program = engine.program(
                    station, (bucket, nfe, keep), lambda on: self._build(on, bucket, nfe, keep)
                )
                if isinstance(program, Program):
                    static = engine.prepared(station, bucket).cond
                    ins = requests.of_conditioning(static, cond, engine.guided)
                    ins += requests.into(program.inputs["z"], z)
                    ins += requests.into(program.inputs["times"], steps.times)
                    ins += requests.into(program.inputs["dt"], steps.dt)
                    if self.guidance is not None:
                        ins += requests.into(program.inputs["guidance"], self.guidance)
                    results, outs = _results(program.outputs, z)
                    station.slot.replay(ins, [program.graph], outs)
                    frames = total if engine.packed else sum(lengths)
                    engine.count(hits=1, frames=frames, padded_frames=bucket.size - frames)
                    return Rollout(
                        results["displacement"],
                        results["z"],
                        steps.times,
                        steps.elapsed,
                        results.get("states"),
                        results.get("displacements"),
                    )
                reason = program
        engine.fall_back(reason)
        return super()._rollout(z, steps, cond, keep)

    def stats(self) -> Stats:
        """Counters since construction, and the device memory held."""
        return self._engine.stats()

    def refresh(self) -> None:
        """Capture anew what weights have moved away from; in-place changes need no refresh."""
        self._engine.refresh()

    def close(self) -> None:
        """Give up graphs and buffers; the teacher is of no use afterwards."""
        self._engine.close()

    def __enter__(self) -> GraphTeacher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _build(self, station: Station, bucket: Bucket, nfe: int, keep: bool) -> Program:
        engine = self._engine
        cond = engine.prepared(station, bucket).cond

        def buffer(name: str, *dims: str | int) -> Tensor:
            if dims[0] != "rows":  # of a size per number of sub-steps
                name = f"{name}.{nfe}"
            return engine.buffer(station, name, TensorSpec(dims, torch.float32), bucket)

        state = ("rows", "frames", self.model.channels)
        inputs = {
            "z": buffer("z", *state),
            "times": buffer("times", nfe + 1, "rows"),
            "dt": buffer("dt", nfe, "rows"),
        }
        if engine.guided:
            inputs["guidance"] = buffer("guidance", "rows")
        outputs = {"z": inputs["z"], "displacement": buffer("displacement", *state)}
        if keep:
            for name in ("states", "displacements"):
                outputs[name] = buffer(name, nfe + 1, *state)

        def rollout() -> None:
            run = solve(
                self.model,
                inputs["z"],
                inputs["times"],
                inputs["dt"],
                cond,
                inputs.get("guidance"),
                keep=keep,
            )
            for name, result in (("z", run.x), *run._asdict().items()):
                if name in outputs:
                    outputs[name].copy_(result)

        return Program(inputs, outputs, engine.capture(station, rollout))


def _results(outputs: Mapping[str, Tensor], z: Tensor) -> tuple[dict[str, Tensor], list[Copy]]:
    """New tensors of the request's shape, and the copies that fill them."""
    results, copies = {}, []
    for name, static in outputs.items():
        if static.ndim == z.ndim:
            results[name] = torch.empty_like(z, memory_format=torch.contiguous_format)
            copies.append(Copy(results[name], static))
        else:
            results[name] = z.new_empty((static.shape[0], *z.shape))
            copies += [Copy(*pair) for pair in zip(results[name], static, strict=True)]
    return results, copies
