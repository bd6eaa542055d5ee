"""What graph samplers and teachers share: static buffers, captured programs, slots, counters."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imf_kernels import checks, dispatch
from imf_kernels.graphs import buckets as tiers
from imf_kernels.graphs import runtime
from imf_kernels.graphs.buckets import Bucket, PackedBucket
from imf_kernels.models.conditioning import Conditioning, TensorSpec
from imf_kernels.profiling import span


@dataclass(frozen=True)
class Stats:
    """Counters since construction.

    Attributes:
        hits: Requests answered by a replay.
        fallbacks: Requests that ran eagerly although graphs are in use, by reason.
        eager: Requests where there is nothing to capture with (no CUDA).
        captures: Graphs captured.
        grids: Grids loaded: a replay of the table graph each, or a choice of a baked table.
        frames: Frames asked for in hits; padded_frames: frames computed beyond them.
        bytes_held: Device memory of static buffers and graph pools.
    """

    hits: int
    fallbacks: Mapping[str, int]
    eager: int
    captures: int
    grids: int
    frames: int
    padded_frames: int
    bytes_held: int


class Fallback(NamedTuple):
    """Why a request runs eagerly: what is counted, and what a warning adds."""

    reason: str
    detail: str


class Program(NamedTuple):
    """One captured function in one bucket: where its inputs go, and where its results lie."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    graph: runtime.Graph


class Prepared(NamedTuple):
    """A bucket's static conditioning, and for requests to be prepared the inputs of `prepare`."""

    cond: Conditioning
    inputs: Mapping[str, Tensor]
    graph: runtime.Graph | None


@dataclass
class Station:
    """A slot with its buffers and programs. Whoever uses it holds the lock."""

    slot: runtime.Slot
    lock: threading.Lock = field(default_factory=threading.Lock)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    prepared: dict[Bucket, Prepared] = field(default_factory=dict)
    programs: dict[Any, Program | Fallback] = field(default_factory=dict)
    loaded: Any = None
    """Which grid the step tables hold."""

    @property
    def bytes_held(self) -> int:
        return self.slot.bytes_held() + sum(buffer.nbytes for buffer in list(self.buffers.values()))


class Engine:
    """Captures and replays a model's solves in buckets; decides what runs eagerly instead.

    Args:
        model: With `specs` (and for `prepare` inside a graph, `inputs`) as `models.DiT` has them.
        buckets: `(rows, frames)` each, or `(rows, total, frames)` for packed rows.
        slots: How many replays may be under way at once.
        guided: Whether conditionings hold both branches.
        options: What is given to `prepare` beside its tensors.
        prepares: Whether requests may bring the arguments of `prepare` in place of its result.
    """

    def __init__(
        self,
        model: Any,
        buckets: Iterable[tuple[int, ...]],
        slots: int,
        guided: bool,
        options: Mapping[str, Any],
        prepares: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module) or not hasattr(model, "specs"):
            raise TypeError(
                "model: expected a module that declares `specs` of its conditioning "
                f"(imf_kernels.models), got {type(model).__name__}"
            )
        if options.get("upstream_padding"):  # it lets the padded size in, here the bucket's
            raise ValueError(
                "prepare: expected options under which a batch equals its rows, got "
                "upstream_padding (prepare outside and give `cond`)"
            )
        self.model: Any = model
        self.guided, self.options = guided, dict(options)
        self.prepares = prepares and hasattr(model, "inputs")
        self.buckets: Any = tiers.table(buckets)
        self.packed = isinstance(self.buckets[0], PackedBucket)
        if self.packed and "packed" not in self.model.specs:  # type: ignore[operator]
            raise ValueError(
                "buckets: expected (rows, frames), as this model does not evaluate packed rows, "
                f"got {tuple(self.buckets[0])}"
            )
        if "packed" in self.options:
            raise ValueError("prepare: expected no `packed`, which is the buckets' to say")
        self.device = next(model.parameters()).device
        self.max_rows = max(bucket.rows for bucket in self.buckets)
        self._counts: Counter[str] = Counter()
        self._fallbacks: Counter[str] = Counter()
        self._warned: set[str] = set()
        self._count_lock = threading.Lock()
        self._turn = itertools.count()
        self.closed = False
        self.stations = [
            Station(slot)
            for slot in (runtime.slot_on(self.device) for _ in range(slots))
            if slot is not None
        ]
        self._give_up = weakref.finalize(self, _give_up, self.stations)
        self._give_up.atexit = False  # CUDA may be gone by then
        self._fix_weights()

    def _fix_weights(self) -> None:
        if hasattr(self.model, "fuse_weights"):
            self.model.fuse_weights()  # later it would move them
        self.fixed = runtime.Fixed.of(self.model)
        self.backend = dispatch.forced()

    # -- counters ---------------------------------------------------------------------------------

    def count(self, **counts: int) -> None:
        with self._count_lock:
            self._counts.update(counts)

    def fall_back(self, why: Fallback) -> None:
        """Count a request that runs eagerly, and say so the first time."""
        reason, detail = why
        with self._count_lock:
            self._fallbacks[reason] += 1
            first = reason not in self._warned
            self._warned.add(reason)
        if first:
            warnings.warn(
                f"a solve runs eagerly, without its CUDA graph: {reason}, {detail} "
                "(said once a reason; stats() counts)",
                RuntimeWarning,
                stacklevel=4,
            )

    def stats(self) -> Stats:
        bytes_held = sum(station.bytes_held for station in self.stations)
        with self._count_lock:
            names = ("hits", "eager", "captures", "grids", "frames", "padded_frames")
            counts = {name: self._counts[name] for name in names}
            return Stats(**counts, fallbacks=dict(self._fallbacks), bytes_held=bytes_held)

    # -- what runs eagerly ------------------------------------------------------------------------

    def why_eager(self, lengths: Sequence[int], total: int, cond: Any) -> Fallback | None:
        """Why a request cannot be a replay; None if it can."""
        if tiers.choose(self.buckets, lengths, total) is None:
            asked = f"{len(lengths)} rows of up to {max(lengths)} frames, {total} in all"
            return Fallback("no bucket", f"for {asked}")
        if torch.is_autocast_enabled(self.device.type):
            return Fallback("autocast", "without which graphs are captured, is on")
        if dispatch.forced() != self.backend:
            return Fallback(
                "backend", f"{dispatch.forced()!r} instead of {self.backend!r}, as captured"
            )
        if cond is not None and (
            not isinstance(cond, Conditioning) or set(cond) != set(self.names)
        ):
            given = sorted(cond) if isinstance(cond, Mapping) else type(cond).__name__
            return Fallback("conditioning", f"of {given} instead of {sorted(self.names)}")
        return None

    def check(self, given: Iterable[tuple[str, Any]], cond: Any = None) -> None:
        """Refuse what must never be answered: closed, moved weights, other devices, and where
        gradients are on, arguments that ask for them.

        A conditioning is data: prepared while gradients are on, it always asks for them.
        """
        self.check_open()
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("expected no capture under way, the current stream is capturing")
        moved = self.fixed.moved()
        if moved is not None:
            raise RuntimeError(
                f"model: expected weights where they were at construction, {moved!r} has moved or "
                "was replaced: graphs and step tables know the old one. Call refresh()."
            )
        prepared = cond if isinstance(cond, Mapping) else {}
        for name, value in [*given, *prepared.items()]:
            rows = value if isinstance(value, list | tuple) else [value]
            for tensor in (row for row in rows if isinstance(row, Tensor)):
                checks.same_device(name, tensor, self.device)
                asks = tensor.requires_grad and torch.is_grad_enabled()
                if asks and name not in prepared:
                    raise ValueError(
                        f"{name}: expected a tensor without gradient, of which a graph passes none "
                        "(use imf_kernels.sampler.sample(..., grad=True))"
                    )

    def check_open(self) -> None:
        if self.closed:
            raise RuntimeError("expected open graphs, these are closed")

    # -- slots and programs -----------------------------------------------------------------------

    @contextlib.contextmanager
    def station(self) -> Iterator[Station]:
        """The next station, in turn."""
        station = self.stations[next(self._turn) % len(self.stations)]
        with station.lock:
            self.check_open()
            yield station

    def buffer(
        self, station: Station, name: str, spec: TensorSpec, bucket: Bucket, branches: int = 1
    ) -> Tensor:
        """The bucket's view of the static buffer `name`, which serves every bucket."""

        def shape(bucket: Bucket) -> tuple[int, ...]:
            return spec.shape(branches * bucket.rows, bucket.frames, branches * bucket.size)

        flat = station.buffers.get(name)
        if flat is None:
            size = max(math.prod(shape(other)) for other in self.buckets)
            dtype = spec.dtype or self.model.dtype
            with torch.inference_mode(False):
                flat = torch.full((size,), spec.pad, dtype=dtype, device=self.device)
            station.buffers[name] = flat
        return flat[: math.prod(shape(bucket))].view(shape(bucket))

    def prepared(self, station: Station, bucket: Bucket) -> Prepared:
        """The bucket's conditioning, and its `prepare` captured where requests may need it."""
        if bucket in station.prepared:
            return station.prepared[bucket]
        specs = {name: self.model.specs[name] for name in self.names}
        cond = Conditioning(
            {
                name: self.buffer(station, f"cond.{name}", spec, bucket, branches=1 + self.guided)
                for name, spec in specs.items()
            },
            specs,
        )
        inputs: dict[str, Tensor] = {}
        graph = None
        if self.prepares:
            inputs = {
                name: self.buffer(station, f"input.{name}", spec, bucket)
                for name, spec in self.model.inputs.items()
            }

            def prepare() -> None:
                for name, tensor in self.prepare(inputs, bucket.size).items():
                    cond[name].copy_(tensor)

            graph = self.capture(station, prepare)
        station.prepared[bucket] = Prepared(cond, inputs, graph)
        return station.prepared[bucket]

    def prepare(self, conditions: Mapping[str, Any], total: int) -> Conditioning:
        """`total` are the frames that packed rows are laid among."""
        packed = {"packed": total} if self.packed else {}
        with torch.no_grad():
            return self.model.prepare(**conditions, **packed, guided=self.guided, **self.options)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """What a conditioning holds, with this sampler's options."""
        if not hasattr(self.model, "inputs"):
            return tuple(self.model.specs)
        least = {
            name: torch.full(spec.shape(1, 1), spec.pad, dtype=spec.dtype, device=self.device)
            for name, spec in self.model.inputs.items()
        }
        return tuple(self.prepare(least, total=1))

    def capture(self, station: Station, function: Callable[[], None]) -> runtime.Graph:
        # what is captured serves later callers as well, whatever mode this one is in
        with (
            span("capture"),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(self.device.type, enabled=False),
            dispatch.backend(self.backend),
        ):
            graph = station.slot.capture(function)
        self.count(captures=1)
        return graph

    def program(
        self, station: Station, key: Any, build: Callable[[Station], Program]
    ) -> Program | Fallback:
        """The station's program of that key, captured if it is new; or why that has failed."""
        if key not in station.programs:
            try:
                station.programs[key] = build(station)
            except Exception as error:  # whatever a model or CUDA raises: serving goes on eagerly
                station.programs[key] = Fallback(
                    "capture failed", f"{type(error).__name__}: {error}"
                )
        return station.programs[key]

    def refresh(self) -> None:
        """Forget derived copies and failed captures; the graphs as well, where weights have moved
        or another backend is on."""
        with contextlib.ExitStack() as stack:
            for station in self.stations:
                stack.enter_context(station.lock)
                station.loaded = None
                for key, program in list(station.programs.items()):
                    if isinstance(program, Fallback):
                        del station.programs[key]
            if self.fixed.moved() is not None or dispatch.forced() != self.backend:
                _give_up(self.stations)
                for station in self.stations:  # a pool that was given up cannot come back
                    slot = runtime.slot_on(self.device)
                    assert slot is not None
                    station.slot = slot
            self._fix_weights()

    def close(self) -> None:
        """Give up graphs and buffers. Waits for what is running; later calls are refused."""
        with contextlib.ExitStack() as stack:
            for station in self.stations:
                stack.enter_context(station.lock)
            self.closed = True
            self._give_up()


def _give_up(stations: Sequence[Station]) -> None:
    """Also what happens to an engine that nobody closed: nothing of it may be freed while it
    runs."""
    for station in stations:
        station.programs.clear()
        station.prepared.clear()
        station.slot.close()
        station.buffers.clear()
