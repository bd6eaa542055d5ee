"""Fixed-NFE sampling through CUDA graphs: one replay for the whole solve."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imf_kernels import checks, grids
from imf_kernels.graphs import buckets as tiers
from imf_kernels.graphs import requests
from imf_kernels.graphs.buckets import DEFAULT, Bucket
from imf_kernels.graphs.engine import Engine, Fallback, Program, Station, Stats
from imf_kernels.graphs.requests import Rows
from imf_kernels.models.baked import Baked
from imf_kernels.models.conditioning import Conditioning, TensorSpec
from imf_kernels.models.dit import DiT
from imf_kernels.models.step_tables import StepTables
from imf_kernels.models.step_tokens import StepTokenDiT
from imf_kernels.ops.ragged_copy import Copy
from imf_kernels.profiling import span
from imf_kernels.solver import euler, laid_out, model_dtype, row_lengths

Grid = str | Tensor | Sequence[float]


class GraphSampler:
    """Solves of a student, or of a guided teacher's model, replayed from CUDA graphs.

    A request is padded to a bucket; one replay then does the whole solve, for any grid, lengths,
    guidance and conditioning of that bucket, from any thread. Results equal
    `imf_kernels.sampler.sample` on the request alone to rounding (relative RMS 1e-5 in float32).
    Modulations come from step tables, so a new grid costs one table, not a capture.

    Where there is no CUDA everything runs eagerly, unpadded, with the same signatures.

    Runs eagerly, counted and warned of once: a request that no bucket holds, a conditioning of
    other tensors than captured, autocast, another backend than at construction, a bucket whose
    capture failed. Refused: tensors of another device or with gradients, a stream that is itself
    capturing, weights that were moved or replaced, weights behind the tables that are known to have
    changed (`refresh`), everything after `close`.

    Args:
        model: A module with `specs` and `channels` (`models.DiT`) in eval mode, or `models.Baked`.
        nfe: Evaluations per solve; a baked model knows its own.
        buckets: `(rows, frames)` each; `DEFAULT` is 42 of up to 8 rows and 3200 frames. Or
            `(rows, total, frames)` each, for a model that evaluates packed rows (`models.DiT`): up
            to `total` frames in all, none of the rows longer than `frames`; see `PACKED`.
        guidance: w for a guided solve, whose conditionings hold both branches; None for a student.
            A request may bring another w.
        slots: How many solves may be under way at once, each with buffers and a stream of its own.
        grid: The default grid, a name or times; for a baked model its first.
        prepare: What `model.prepare` is given beside its tensors (`{"streaming": True}`).

    Changes of weights: what the captured kernels read they read anew at every replay, so in-place
    updates are seen at once. The step tables are a derived copy: after changing weights call
    `refresh()`. A change that PyTorch counts (optimizers without `fused`, in-place operations) is
    noticed and refused until then; one that it does not count (`p.data` writes, fused optimizers)
    cannot be.
    """

    def __init__(
        self,
        model: Any,
        nfe: int | None = None,
        buckets: Iterable[tuple[int, ...]] = DEFAULT,
        guidance: Tensor | float | None = None,
        slots: int = 1,
        *,
        grid: Grid | None = None,
        prepare: Mapping[str, Any] | None = None,
    ) -> None:
        self.baked = model if isinstance(model, Baked) else None
        if self.baked is not None:
            model = self.baked.model
            if nfe not in (None, self.baked.nfe):
                raise ValueError(f"nfe: expected {self.baked.nfe}, as baked, got {nfe}")
            nfe = self.baked.nfe
            grid = self.baked.grids[0] if grid is None else grid
        if nfe is None:
            raise ValueError("nfe: expected an integer >= 1, got None")
        checks.positive_int("nfe", nfe)
        checks.positive_int("slots", slots)
        if isinstance(guidance, Tensor):
            raise TypeError("guidance: expected a number or None, got a tensor (sample takes it)")
        if guidance is not None:
            requests.check_guidance(guidance, rows=0)
        steps = (prepare or {}).get("steps")
        if isinstance(model, StepTokenDiT) and steps != nfe:
            raise ValueError(
                f"prepare: expected steps {nfe} for this model and nfe {nfe}, got {steps}"
            )
        self.nfe, self.guidance = nfe, guidance
        self._tabled = self.baked is not None or hasattr(model, "tables")
        self._engine = Engine(model, buckets, slots, guidance is not None, prepare or {})
        self._eager_tables: tuple[Any, StepTables | None] = (None, None)
        self._generation = 0
        self._watch()
        self.set_grid("uniform" if grid is None else grid)

    # -- the public face --------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        return self._engine.model

    def set_grid(self, grid: Grid) -> None:
        """The grid of later `sample` calls: a name or times, float32 `(nfe + 1,)`.

        Raises:
            ValueError: not a grid of `nfe` steps, or not a baked one.
        """
        self.grid = self._checked(grid)

    def warm_up(self) -> None:
        """Capture every bucket in every slot, the largest first.

        Otherwise a bucket is captured when it is first needed: a second or so for that request.
        """
        for station in self._engine.stations:
            with station.lock:
                self._engine.check_open()
                for bucket in self._engine.buckets:
                    program = self._program(station, bucket)
                    if isinstance(program, Fallback):
                        reason, detail = program
                        warnings.warn(
                            f"the bucket {tuple(bucket)} has no graph: {reason}, {detail}",
                            RuntimeWarning,
                            stacklevel=2,
                        )

    def sample(
        self,
        noise: Rows,
        cond: Conditioning | None = None,
        grid: Grid | None = None,
        *,
        conditions: Mapping[str, Any] | None = None,
        guidance: Tensor | float | None = None,
    ) -> Any:
        """Carry noise to data.

        Args:
            noise: State at time 0, float32 `(B, N, C)`; or, with `conditions`, rows of their own
                lengths, a list of `(n, C)`.
            cond: From `model.prepare` (with `guided=True` for a guided sampler), or
            conditions: the arguments of `model.prepare`, prepared in a graph as well. Each is a
                batch or a list of rows. Without `lengths` every row is as long as its noise.
            grid: Times or a name; by default that of `set_grid`.
            guidance: w for this request, a number or float32 `(B,)`.

        Returns:
            The state at time 1, float32 `(B, N, C)`, frames beyond a row's length stay noise; or a
            list of `(n, C)`. It belongs to the caller and is ready in the order of the caller's
            stream.

        Raises:
            ValueError, TypeError, RuntimeError: see the class.
        """
        if (cond is None) == (conditions is None):
            raise ValueError("cond: expected either cond or conditions, got both or none")
        lengths = self._check(noise, cond, conditions, guidance)
        times = self.grid if grid is None else self._checked(grid)
        guidance = self.guidance if guidance is None else guidance
        total = requests.total_frames(lengths, self._engine.guided, cond, conditions)
        request = (noise, lengths, total, cond, times, conditions, guidance)
        with span("solve", self.nfe), torch.no_grad():
            if not self._engine.stations:
                self._engine.count(eager=1)
                return self._eager(*request)
            reason = self._engine.why_eager(lengths, total, cond)
            if reason is None:
                result = self._replay(*request)
                if not isinstance(result, Fallback):
                    return result
                reason = result
            self._engine.fall_back(reason)
            return self._eager(*request)

    def stats(self) -> Stats:
        """Counters since construction, and the device memory held."""
        return self._engine.stats()

    def refresh(self) -> None:
        """Follow the model's weights: compute step tables anew, capture anew what has moved."""
        if self.baked is not None:
            raise RuntimeError("a baked sampler is a snapshot and has no weights to follow")
        self._generation += 1
        self._engine.refresh()
        self._watch()

    def save(self, path: str | Path) -> None:
        """Write a baked sampler's model; see `models.Baked.save`."""
        if self.baked is None:
            raise RuntimeError("save: expected a baked sampler (imf_kernels.graphs.bake)")
        self.baked.save(path)

    def close(self) -> None:
        """Give up graphs and buffers; the sampler is of no use afterwards."""
        self._engine.close()

    def __enter__(self) -> GraphSampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- checks -----------------------------------------------------------------------------------

    def _checked(self, grid: Grid) -> Tensor:
        times = grids.make(grid, self.nfe)
        if self.baked is not None:
            self.baked.index(times)
        return times

    def _check(
        self, noise: Rows, cond: Any, conditions: Mapping[str, Any] | None, guidance: Any
    ) -> list[int]:
        """Check a request; returns the frames of its rows' noise."""
        self._check_versions()
        lengths = requests.check_noise(noise, self.model.channels)
        given = [("noise", noise), ("guidance", guidance)]
        if cond is not None:
            if not isinstance(noise, Tensor):
                raise ValueError("noise: expected a tensor with `cond` (rows go with `conditions`)")
            requests.check_cond(cond, self.model.specs, lengths, self._engine.guided)
        if conditions is not None:
            requests.check_conditions(conditions, getattr(self.model, "inputs", None), lengths)
            given += conditions.items()  # a student's own guidance among them
        if guidance is not None:
            if self.guidance is None:
                raise ValueError("guidance: expected None for a sampler without, got one")
            requests.check_guidance(guidance, len(lengths))
        self._engine.check(given, cond)
        return lengths

    def _watch(self) -> None:
        """Remember the state of the weights behind the tables."""
        sources = getattr(self.model, "table_sources", tuple)
        self._sources = () if self.baked is not None else tuple(sources())
        self._versions = sum(p._version for p in self._sources)

    def _check_versions(self) -> None:
        if sum(p._version for p in self._sources) != self._versions:
            raise RuntimeError(
                "model: expected weights unchanged since their step tables were made, "
                "got an in-place change. Call refresh()."
            )

    # -- replay -----------------------------------------------------------------------------------

    def _replay(
        self,
        noise: Rows,
        lengths: list[int],
        total: int,
        cond: Conditioning | None,
        times: Tensor,
        conditions: Mapping[str, Any] | None,
        guidance: Tensor | float | None,
    ) -> Any:
        """The result, or why the bucket has no graph."""
        engine = self._engine
        bucket = tiers.choose(engine.buckets, lengths, total)
        assert bucket is not None
        with engine.station() as station:
            program = self._program(station, bucket)
            if isinstance(program, Fallback):
                return program
            ins, graphs, loaded = self._load(station, times)
            prepared = engine.prepared(station, bucket)
            if cond is not None:
                ins += requests.of_conditioning(prepared.cond, cond, engine.guided)
            else:
                assert conditions is not None
                for name, value in requests.with_lengths(conditions, lengths).items():
                    pad = self.model.inputs[name].pad
                    ins += requests.into(prepared.inputs[name], value, pad)
                assert prepared.graph is not None
                graphs.append(prepared.graph)
            ins += requests.into(program.inputs["x"], noise)
            if guidance is not None:
                ins += requests.into(program.inputs["guidance"], guidance)
            x = program.outputs["x"]
            if isinstance(noise, Tensor):
                result: Any = torch.empty_like(noise, memory_format=torch.contiguous_format)
                outs = [Copy(result, x)]
            else:
                result = [
                    torch.empty_like(row, memory_format=torch.contiguous_format) for row in noise
                ]
                outs = [Copy(row, x[i]) for i, row in enumerate(result)]
            station.loaded = None  # should the replay raise
            station.slot.replay(ins, [*graphs, program.graph], outs)
            station.loaded = loaded
        frames = total if engine.packed else sum(lengths)
        engine.count(hits=1, frames=frames, padded_frames=bucket.size - frames)
        return result

    def _program(self, station: Station, bucket: Bucket) -> Program | Fallback:
        return self._engine.program(station, bucket, lambda on: self._build(on, bucket))

    def _build(self, station: Station, bucket: Bucket) -> Program:
        """Capture the solve of one bucket; the first one captures the loading of a grid too."""
        engine, model = self._engine, self.model
        if "grid" not in station.programs:
            with torch.inference_mode(False), torch.no_grad():
                station.programs["grid"] = self._build_grid(station)
        cond = engine.prepared(station, bucket).cond
        state = TensorSpec(("rows", "frames", model.channels), torch.float32)
        x = engine.buffer(station, "x", state, bucket)
        w = None
        if engine.guided:
            w = engine.buffer(station, "w", TensorSpec(("rows",), torch.float32, pad=1.0), bucket)
        dt = station.buffers["dt"][:, : bucket.rows]
        t = station.buffers["t"][:, : bucket.rows]
        tables = StepTables(station.buffers["blocks"], station.buffers["final"])

        def solve() -> None:
            laid = laid_out(model, cond, bucket.rows)

            def velocity(k: int, state: Tensor) -> Tensor:
                if self._tabled:
                    return model.evaluate(state, tables.at(k), laid)
                return model(state, t[k], t[k + 1], laid)

            x.copy_(
                euler(
                    velocity,
                    x,
                    dt,
                    w,
                    lengths=row_lengths(cond, bucket.rows),
                    model_dtype=model_dtype(model, x.dtype),
                    accumulate=False,
                ).x
            )

        inputs = {"x": x} if w is None else {"x": x, "guidance": w}
        return Program(inputs, {"x": x}, engine.capture(station, solve))

    # -- grids ------------------------------------------------------------------------------------

    def _build_grid(self, station: Station) -> Program:
        """Static times and tables of a slot, for all its buckets, and the graph that fills them."""
        engine = self._engine
        grid = grids.uniform(self.nfe).to(engine.device)
        buffers = station.buffers
        buffers["grid"] = grid
        buffers["t"] = grid[:, None].repeat(1, engine.max_rows)
        buffers["dt"] = buffers["t"].diff(dim=0)
        if self.baked is not None:
            parts = self.baked.at(self.baked.grids[0])
        elif self._tabled:
            parts = self.model.tables(grid[:-1], grid[1:])
        else:
            parts = StepTables(grid[:0], grid[:0])
        buffers["blocks"], buffers["final"] = (part.contiguous().clone() for part in parts)

        def load() -> None:
            buffers["t"].copy_(grid[:, None].expand_as(buffers["t"]))
            buffers["dt"].copy_(grid.diff()[:, None].expand_as(buffers["dt"]))
            if self.baked is None and self._tabled:
                made = self.model.tables(grid[:-1], grid[1:])
                buffers["blocks"].copy_(made.blocks)
                buffers["final"].copy_(made.final)

        return Program({"grid": grid}, {}, engine.capture(station, load))

    def _load(self, station: Station, times: Tensor) -> tuple[list[Copy], list[Any], Any]:
        """Copies and graphs that bring a station's tables to a grid, and what it then holds."""
        key = self._key(times)
        if key is not None and station.loaded == key:
            return [], [], key
        program = station.programs["grid"]
        assert isinstance(program, Program)
        on_device = times.to(self._engine.device, non_blocking=True)
        copies = [Copy(program.inputs["grid"], on_device)]
        if self.baked is not None:
            index = self.baked.index(times)
            for name, part in zip(("blocks", "final"), self.baked.tables, strict=True):
                copies.append(Copy(station.buffers[name], part[index]))
        self._engine.count(grids=1)
        return copies, [program.graph], key

    def _key(self, times: Tensor) -> Any:
        """What tables are known by; None for a CUDA grid, which is not read and may be any."""
        return (self._generation, tuple(times.tolist())) if checks.readable(times) else None

    # -- eager ------------------------------------------------------------------------------------

    def _eager(
        self,
        noise: Rows,
        lengths: list[int],
        total: int,
        cond: Any,
        times: Tensor,
        conditions: Mapping[str, Any] | None,
        guidance: Tensor | float | None,
    ) -> Any:
        """The same solve on the request's own shape."""
        engine, model = self._engine, self.model
        x = requests.batch(noise, max(lengths))
        if cond is None:
            assert conditions is not None
            given = {}
            for name, value in requests.with_lengths(conditions, lengths).items():
                spec = model.inputs[name]
                given[name] = requests.batch(value, max(lengths), spec, engine.device)
            cond = engine.prepare(given, total)
        cond = laid_out(model, cond, len(x))
        t = times.to(x.device, non_blocking=True)[:, None].expand(-1, len(x)).contiguous()
        tables = self._tables_of(times)

        def velocity(k: int, state: Tensor) -> Tensor:
            if tables is None:
                return model(state, t[k], t[k + 1], cond)
            return model.evaluate(state, tables.at(k), cond)

        x = euler(
            velocity,
            x,
            t.diff(dim=0),
            guidance,
            lengths=row_lengths(cond, len(x)),
            model_dtype=model_dtype(model, x.dtype),
            accumulate=False,
        ).x
        if isinstance(noise, Tensor):
            return x
        return [row[:frames].clone() for row, frames in zip(x, lengths, strict=True)]

    def _tables_of(self, times: Tensor) -> StepTables | None:
        """The tables of a grid, the last one's kept for the stream that made them."""
        if self.baked is not None:
            return self.baked.at(times)
        if not self._tabled:
            return None
        device = self._engine.device
        stream = torch.cuda.current_stream(device).stream_id if device.type == "cuda" else None
        grid = self._key(times)
        key = (grid, stream)
        known, tables = self._eager_tables
        if grid is None or known != key:
            on_device = times.to(self._engine.device)
            tables = self.model.tables(on_device[:-1], on_device[1:])
            self._eager_tables = (key, tables)
        return tables


def bake(
    student: DiT, grids: Sequence[Grid], nfe: int | None = None, **options: Any
) -> GraphSampler:
    """A sampler for these grids only, without the student's adaLN weights (41 % of F5-TTS's).

    It holds a copy of the other weights (`sampler.baked.nbytes` in all); drop the student to free
    its own. `sampler.save(path)` writes it; `GraphSampler(Baked.load(path))` needs no student.

    Args:
        grids: Times, or names with `nfe`, all of the same NFE.
        options: As for `GraphSampler`: buckets, guidance, slots, grid, prepare.

    Raises:
        ValueError: no grids, or grids of different NFE.
    """
    return GraphSampler(Baked.of(student, grids, nfe), **options)
