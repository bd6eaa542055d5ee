"""A pool of streams that take frame-level features, and their common Euler steps."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imf_kernels import checks, grids, guidance
from imf_kernels.models import Baked, Cache, Conditioning, Modulation
from imf_kernels.models.estimator import Estimator
from imf_kernels.models.scope import to_device
from imf_kernels.ops import guided_euler_step
from imf_kernels.profiling import span, spanned


class Full(RuntimeError):
    """The pool has no room for another stream of that size, for now."""


class Streams:
    """A pool of memory and the streams that live in it, stepped together.

    Any thread may call any method, also of the streams; one call runs at a time. On CUDA all calls
    belong on one CUDA stream, and no step waits for the device.

    Args:
        model: A `CausalUNet`, a `DiT` with causal convolutions, or a `Baked` one. Its step tables
            are made here: later changes of its weights need a new pool.
        grid: Float32 times `(nfe + 1,)` ascending from 0 to 1, or a name with `nfe`.
        nfe: Number of evaluations; may be left out for a custom grid.
        guidance: w (`imf_kernels.guidance`) of a teacher; None: one branch.
        frames: How many frames all streams together may declare.
        streams: How many streams may be open at once.

    Attributes:
        frames_evaluated: Frames that the model was asked for so far, counted at every step and in
            every branch. (Two more in front of a stream's new ones pass through a `CausalUNet`.)
        nbytes: What the pool holds, for all that may be open.

    Raises:
        ValueError, TypeError: naming the argument, the expected and the given value.
    """

    def __init__(
        self,
        model: Estimator | Baked,
        grid: str | Tensor | Sequence[float] = "uniform",
        nfe: int | None = None,
        *,
        guidance: float | None = None,
        frames: int,
        streams: int = 1,
    ) -> None:
        self.model: Any = model.model if isinstance(model, Baked) else model
        if not isinstance(self.model, Estimator):
            raise TypeError(f"model: expected a CausalUNet or a DiT, got {type(model).__name__}")
        sizes = self.model.cache_sizes
        if isinstance(guidance, Tensor):
            raise TypeError("guidance: expected a number for all streams, got a tensor")
        checks.guidance(guidance, torch.empty(0, 0, 0))
        checks.positive_int("frames", frames)
        checks.positive_int("streams", streams)
        self.guidance, self.frames, self.streams = guidance, frames, streams
        self.device = self.model.last.weight.device
        times = grids.make(grid, nfe)
        on_device = times.to(self.device)
        self._tables = (
            model.at(times).to(self.device)
            if isinstance(model, Baked)
            else self.model.tables(on_device[:-1], on_device[1:])
        )
        self._dt = on_device.diff()
        self.nfe, self.branches = len(self._dt), 1 if guidance is None else 2
        self._lines = self.nfe * self.branches
        """Each step and branch has a cache of its own: `_lines` times all frames and slots."""
        lines = self._lines * frames, self._lines * streams
        with torch.inference_mode(False):  # what is made inside may only be written inside
            self._cache = Cache(sizes, *lines, self.model.dtype, self.device)
        self._open: list[Stream] = []
        self._lock = threading.RLock()
        self.frames_evaluated = 0

    @property
    def nbytes(self) -> int:
        return self._cache.nbytes

    def open(
        self,
        max_frames: int,
        *,
        spks: Tensor,
        noise: Tensor | torch.Generator,
        prompt: Tensor | None = None,
        guidance: float | None = None,
    ) -> Stream:
        """A stream of at most `max_frames` frames, the prompt's included; its memory is taken now.

        Args:
            spks: Speaker features `(C,)`.
            noise: Of all frames from the prompt's first, float32 `(max_frames, C)`; or where to
                draw it from.
            prompt: Prompt mel `(P, C)`: the first P frames continue nothing and are not emitted.
            guidance: w of a student that is told it; a teacher's is the pool's.

        Raises:
            Full: no room for it beside those that are open.
            ValueError, TypeError: naming the argument, the expected and the given value.
        """
        checks.positive_int("max_frames", max_frames)
        if max_frames > self.frames:
            raise ValueError(
                f"max_frames: expected at most the pool's {self.frames}, got {max_frames}"
            )
        channels = self.model.channels
        checks.shape("spks", spks, channels)
        if prompt is None:
            prompt = spks.new_zeros(0, channels)
        checks.shape("prompt", prompt, "P", channels)
        if isinstance(guidance, Tensor):
            raise TypeError("guidance: expected a number, got a tensor")
        self.model.check_guidance(guidance, 1)
        given = {"spks": spks, "prompt": prompt}
        if not isinstance(noise, torch.Generator):
            checks.shape("noise", noise, max_frames, channels)
            checks.dtype("noise", noise, torch.float32)
            given["noise"] = noise
        for name, value in given.items():
            checks.floating(name, value)
            checks.same_device(name, value, self.device)
        if prompt.shape[0] > max_frames:
            raise ValueError(
                f"prompt: expected no more than max_frames = {max_frames} frames, "
                f"got {prompt.shape[0]}"
            )
        with self._lock, torch.inference_mode(False), torch.no_grad():
            first, slot = self._room(max_frames)
            if isinstance(noise, torch.Generator):  # now that there is room
                size = max_frames, channels
                drawn = torch.randn(size, generator=noise, device=noise.device, dtype=torch.float32)
                noise = drawn.to(self.device)
            stream = Stream(self, first, slot, max_frames, spks, noise, prompt, guidance)
            lines = range(self._lines)
            slots = [line * self.streams + slot for line in lines]
            self._cache.forget(to_device(slots, self.device))
            self._open.append(stream)
            return stream

    @spanned("sub-step")
    @torch.no_grad()
    def step(self) -> list[Stream]:
        """One Euler step of every stream that has work, all in one evaluation (but for those that
        end in full attention, which take one each).

        A stream's complete blocks that wait when it has none under way become its work together.

        Returns:
            The streams that have something new to `take`. Where one is `busy`, there is more to do.

        If it raises, the streams that were stepped are closed: their caches are not whole.
        """
        with self._lock, torch.autocast(self.device.type, enabled=False):
            at_work = [stream for stream in self._open if stream._begin()]
            try:
                self._extend([stream for stream in at_work if stream._work.whole is None])
                for stream in at_work:
                    if stream._work.whole is not None:
                        self._solve_whole(stream._work, stream._work.whole)
            except BaseException:
                for stream in at_work:
                    stream.close()
                raise
            return [stream for stream in at_work if stream._end()]

    def _room(self, size: int) -> tuple[int, int]:
        """Where a new stream's frames begin (first fit), and its slot."""
        slots = {stream._slot for stream in self._open}
        if len(slots) == self.streams:
            raise Full(f"streams: expected room among {self.streams} open ones, got none")
        first, widest = 0, 0
        taken = sorted((stream._first, stream.max_frames) for stream in self._open)
        for start, frames in [*taken, (self.frames, 0)]:
            if start - first >= size:
                return first, min(set(range(self.streams)) - slots)
            widest, first = max(widest, start - first), start + frames
        raise Full(f"max_frames: expected at most the {widest} that are free in a row, got {size}")

    def _extend(self, streams: list[Stream]) -> None:
        """A step of new frames, each stream at its own."""
        if not streams:
            return
        work = [stream._work for stream in streams]
        sizes = [len(item.x) for item in work]
        rows = [(branch, stream) for branch in range(self.branches) for stream in streams]
        lines = [stream._work.step * self.branches + branch for branch, stream in rows]
        extension = self._cache.extension(
            sizes * self.branches,
            [stream._work.first for _, stream in rows],
            [line * self.frames + of._first for line, (_, of) in zip(lines, rows, strict=True)],
            [line * self.streams + of._slot for line, (_, of) in zip(lines, rows, strict=True)],
        )
        steps = to_device([stream._work.step for _, stream in rows], self.device)
        modulation = Modulation(
            self._tables.blocks[steps, 0].unbind(1), self._tables.final[steps, 0]
        )
        x = torch.cat([item.x for item in work])
        conditions = torch.cat([item.conditions for item in work], dim=1)
        with span("evaluation"):
            v = self.model.extend(x, conditions, modulation, extension)
        of_stream = to_device(sizes, self.device)
        dt = self._dt[steps[: len(work)]].repeat_interleave(of_stream, output_size=len(x))
        self.frames_evaluated += len(v)
        v = v.float() if self.guidance is None else guidance.combine(v, self.guidance)
        x = torch.addcmul(x, dt[:, None], v)
        for item, part in zip(work, x.split(sizes), strict=True):
            item.x, item.step = part, item.step + 1

    def _solve_whole(self, work: _Work, cond: Conditioning) -> None:
        """A step of all of a stream's frames at once, with full attention."""
        step, x = work.step, work.x[None]
        with span("evaluation"):
            v = self.model.evaluate(x, self._tables.at(step), cond)
        work.x = guided_euler_step(x, v, self._dt[step : step + 1], self.guidance).x[0]
        work.step += 1
        self.frames_evaluated += v.shape[0] * v.shape[1]


@dataclass
class _Work:
    """Frames of a stream on their way from noise to data."""

    first: int
    x: Tensor
    conditions: Tensor
    """`(branches, n, D)`."""
    whole: Conditioning | None = None
    """Of all frames, for full attention."""
    step: int = 0


class Stream:
    """One utterance: conditions go in by `feed`, mel frames come out by `take`.

    Made by `Streams.open`; `close`, or the end of a `with` block, gives its memory back.

    Attributes:
        max_frames: Its bound, the prompt's frames included.
        nbytes: Its declared bytes, of which it never holds more between two steps: its share of the
            pool, its noise, conditions and prompt, and the frames under way or not taken.
    """

    def __init__(
        self,
        pool: Streams,
        first: int,
        slot: int,
        max_frames: int,
        spks: Tensor,
        noise: Tensor,
        prompt: Tensor,
        guidance: float | None,
    ) -> None:
        self._pool, self._first, self._slot = pool, first, slot
        self.max_frames = max_frames
        self._spks, self._guidance = spks.clone(), guidance
        self._noise = noise.clone()
        self._mu = torch.empty_like(noise)
        self._prompt = torch.zeros_like(noise)
        self._prompt[: len(prompt)] = prompt
        self._start = len(prompt)
        """The first frame to emit."""
        self._fed = self._solved = 0
        self._work: Any = None
        self._done: list[Tensor] = []
        self._finished = self._full = self._closed = False

    @property
    def nbytes(self) -> int:
        pool = self._pool
        cached = pool._lines * (
            self.max_frames * pool._cache.nbytes_of_frame + pool._cache.nbytes_of_slot
        )
        prepared = sum(
            math.prod(spec.shape(pool.branches, self.max_frames))
            * (spec.dtype or pool.model.dtype).itemsize
            for spec in pool.model.specs.values()
        )
        # float32: noise, features, prompt; states under way; what was not taken
        own = 5 * self._noise.shape[1] * self.max_frames * 4 + self._spks.nbytes
        return cached + prepared + own

    @property
    def channels(self) -> int:
        """Channels C of conditions and mels."""
        return self._noise.shape[1]

    @property
    def device(self) -> torch.device:
        return self._pool.device

    @property
    def prompt_frames(self) -> int:
        """Frames of the prompt, which are solved and not emitted."""
        return self._start

    @property
    def fed(self) -> int:
        """Frames that it was given conditions of."""
        return self._fed

    @property
    def busy(self) -> bool:
        """Whether `Streams.step` has something to do for it."""
        return not self._closed and (self._work is not None or self._ready > self._solved)

    def feed(self, mu: Tensor) -> None:
        """Append conditions `(n, C)`, any n; those of the prompt's frames come first.

        Raises:
            RuntimeError: the stream is finished or closed.
            ValueError, TypeError: frames beyond `max_frames`, or what is no such tensor.
        """
        checks.shape("mu", mu, "n", self.channels)
        checks.floating("mu", mu)
        checks.same_device("mu", mu, self.device)
        with self._pool._lock, torch.no_grad():
            self._check_open()
            self._check_unfinished()
            fed = self._fed + len(mu)
            if fed > self.max_frames:
                raise ValueError(
                    f"mu: expected at most {self.max_frames - self._fed} more frames "
                    f"(max_frames = {self.max_frames}), got {len(mu)}"
                )
            self._mu[self._fed : fed] = mu
            self._fed = fed

    def finish(self, *, full_attention: bool = False, mu: Tensor | None = None) -> None:
        """No more conditions will come: what remains of the last block is solved as well.

        With `full_attention`, all frames are solved once more as one row without the streaming
        mask, as CosyVoice does with its last chunk, and what is not yet on its way is emitted from
        that solve.

        Args:
            mu: With `full_attention`, the conditions of all frames `(n, C)` in the place of those
                that were fed, such as an encoder gives without a streaming mask of its own.

        Raises:
            RuntimeError: the stream is finished or closed.
            ValueError, TypeError: conditions of fewer frames than the prompt has, or `mu` of other
                frames than those fed and more.
        """
        with self._pool._lock, torch.no_grad():
            self._check_open()
            self._check_unfinished()
            if mu is not None:
                self._replace(mu, full_attention)
            if self._fed < self._start:
                raise ValueError(
                    f"mu: expected conditions of the prompt's {self._start} frames, got {self._fed}"
                )
            self._finished, self._full = True, full_attention

    def _replace(self, mu: Tensor, full_attention: bool) -> None:
        """Conditions of all frames in the place of those that were fed."""
        if not full_attention:
            raise ValueError("mu: expected None without full_attention, got a tensor")
        checks.shape("mu", mu, "n", self.channels)
        checks.floating("mu", mu)
        checks.same_device("mu", mu, self.device)
        least = max(self._fed, self._start)
        if not least <= len(mu) <= self.max_frames:
            raise ValueError(
                f"mu: expected conditions of {least} to {self.max_frames} frames, got {len(mu)}"
            )
        self._mu[: len(mu)] = mu
        self._fed = len(mu)

    def take(self) -> Tensor:
        """The frames `(n, C)` that were finished since the last call, float32; n may be 0."""
        with self._pool._lock:
            self._check_open()
            done = self._done or [self._noise[:0]]
            self._done = []
            return torch.cat(done)

    def drain(self) -> Tensor:
        """Step the pool, all streams in it, until this one has no more work; then `take`."""
        while self.busy:
            self._pool.step()
        return self.take()

    def close(self) -> None:
        """Give the memory back; what was not taken is lost. Closing again does nothing."""
        with self._pool._lock:
            if not self._closed:
                self._closed = True
                self._pool._open.remove(self)
                self._work, self._done = None, []
                self._mu = self._prompt = self._noise = self._noise[:0].clone()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("stream: expected an open one, got one that is closed")

    def _check_unfinished(self) -> None:
        if self._finished:
            raise RuntimeError("stream: expected one that goes on, got one that is finished")

    @property
    def _ready(self) -> int:
        """Frames from the first that can be solved."""
        chunk = self._pool._cache.sizes.chunk
        return self._fed if self._finished else self._fed // chunk * chunk

    def _begin(self) -> bool:
        """Take up what waits, if nothing is under way; whether there is work."""
        if self._work is None and self._ready > self._solved:
            first, last = 0 if self._full else self._solved, self._ready
            begin = max(first - self._pool._cache.sizes.behind, 0)
            cond = self._pool.model.prepare(
                self._prompt[None, begin:last],
                mu=self._mu[None, begin:last],
                spks=self._spks[None],
                guidance=self._guidance,
                guided=self._pool.guidance is not None,
            )
            x, conditions = self._noise[first:last], cond["conditions"][:, first - begin :]
            self._work = _Work(first, x, conditions, cond if self._full else None)
        return self._work is not None

    def _end(self) -> bool:
        """Give out what is solved; whether that is something."""
        if self._work.step < self._pool.nfe:
            return False
        work, self._work = self._work, None
        emitted = max(self._solved, self._start)
        self._solved = work.first + len(work.x)
        if self._solved <= emitted:
            return False
        # a copy: a view would hold all that was stepped together
        self._done.append(work.x[emitted - work.first :].clone())
        return True
