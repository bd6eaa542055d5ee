"""Capture and replay on CUDA: through the C++ extension, or torch.cuda.CUDAGraph without it.

What is captured, and when, is decided by `engine`; here are the mechanics of one slot: a stream, a
memory pool and the graphs that live and die with them.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from imf_kernels import dispatch, profiling
from imf_kernels.ops.ragged_copy import Copy, ragged_copy

WARM_UPS = 3
"""Runs before a capture: lazy initialisation, cuBLAS workspaces, Triton's compilation."""


_ONE_CAPTURE = threading.Lock()


class Graph(Protocol):
    """A captured function."""

    def replay(self) -> None: ...


class Slot(Protocol):
    """Where graphs are captured and replayed, one replay at a time."""

    def capture(self, function: Callable[[], None]) -> Graph:
        """Capture what `function` launches. It is run a few times before.

        Whatever it raises is raised again; nothing of the attempt stays behind.
        """

    def replay(self, ins: Sequence[Copy], graphs: Sequence[Graph], outs: Sequence[Copy]) -> None:
        """Copy in, launch the graphs in turn, copy out, in order with the caller's stream."""

    def bytes_held(self) -> int:
        """Device memory of the slot's pool."""

    def close(self) -> None:
        """Give up all graphs, the pool and the stream; the slot is of no use afterwards."""


def slot_on(device: torch.device) -> Slot | None:
    """A new slot; None where there is nothing to capture with, and solves run eagerly."""
    if device.type != "cuda":
        return None
    return _NativeSlot(device) if dispatch.HAS_CUDA_EXTENSION else _TorchSlot(device)


def launch(ins: Sequence[Copy], graphs: Sequence[Graph], outs: Sequence[Copy]) -> None:
    """The parts of a replay, on the current stream."""
    with profiling.span("copy-in"):
        ragged_copy(ins)
    with profiling.span("replay"):
        for graph in graphs:
            graph.replay()
    with profiling.span("copy-out"):
        ragged_copy(outs)


class _Capture(Protocol):
    def begin(self) -> None: ...
    def end(self) -> None: ...
    def abort(self) -> None: ...
    def replay(self) -> None: ...


class _TorchSlot:
    """A slot in pure Python."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = _own_stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.holds_pool = False
        self.graphs: list[Any] = []

    def new_graph(self) -> _Capture:
        return _TorchGraph(self.device, self.pool)

    def capture(self, function: Callable[[], None]) -> Graph:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with (
            _ONE_CAPTURE,
            torch.cuda.device(self.device),
            torch.cuda.stream(self.stream),
        ):
            with self._allocating_in_pool():
                for _ in range(WARM_UPS):
                    function()
            self.stream.synchronize()
            graph = self.new_graph()
            with _no_garbage_collection():
                try:
                    graph.begin()
                    function()
                    graph.end()
                except BaseException:
                    graph.abort()
                    raise
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.graphs.append(graph)
        return graph

    @contextlib.contextmanager
    def _allocating_in_pool(self) -> Iterator[None]:
        """Let warm-ups allocate in the pool.

        What outlives them, above all cuBLAS's workspace of this stream, is then memory of the
        graphs, and no clearing of caches elsewhere takes it away under them.
        """
        index, pool = self.device.index, self.pool
        torch._C._cuda_beginAllocateCurrentThreadToPool(index, pool)
        try:
            yield
        finally:
            torch._C._cuda_endAllocateToPool(index, pool)
            if self.holds_pool:
                torch._C._cuda_releasePool(index, pool)
            self.holds_pool = True  # the first reference stays: a pool at zero cannot come back

    def replay(self, ins: Sequence[Copy], graphs: Sequence[Graph], outs: Sequence[Copy]) -> None:
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            launch(ins, graphs, outs)
        caller.wait_stream(self.stream)

    def bytes_held(self) -> int:
        segments = torch.cuda.memory_snapshot(self.pool)
        return sum(segment["total_size"] for segment in segments)

    def close(self) -> None:
        # graphs of one stream share a cuBLAS workspace: they end together, when none runs
        self.stream.synchronize()
        self.graphs.clear()
        if self.holds_pool:
            torch._C._cuda_releasePool(self.device.index, self.pool)
            self.holds_pool = False
        _STREAMS.discard((self.device.index, self.stream.stream_id))


_STREAMS: set[tuple[int | None, int]] = set()
"""Streams of open slots, by device."""


def _own_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that no other slot has.

    PyTorch gives out 32 streams of a priority in turn, to whoever asks. Work of another thread on a
    stream that is capturing would become part of the graph, hence the high priority, which
    applications rarely ask for.
    """
    for _ in range(64):
        stream = torch.cuda.Stream(device, priority=-1)
        key = device.index, stream.stream_id
        if key not in _STREAMS:
            _STREAMS.add(key)
            return stream
    raise RuntimeError(f"slots: expected at most {len(_STREAMS)} open at once, got one more")


class _NativeSlot(_TorchSlot):
    """The same on the C++ extension: a replay is one call that does not hold the GIL."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.on = (self.stream.stream_id, device.index)
        self.slot = dispatch.EXTENSION.Slot(*self.on)

    def new_graph(self) -> _Capture:
        return dispatch.EXTENSION.Graph(self.pool, *self.on)

    def replay(self, ins: Sequence[Copy], graphs: Sequence[Graph], outs: Sequence[Copy]) -> None:
        if profiling.enabled():  # there are no ranges inside the one call below
            super().replay(ins, graphs, outs)
            return
        self.slot.replay(
            [copy.destination for copy in ins],
            [copy.source for copy in ins],
            [copy.pad for copy in ins],
            graphs,
            [copy.destination for copy in outs],
            [copy.source for copy in outs],
        )


class _TorchGraph:
    """`torch.cuda.CUDAGraph` with the C++ graph's methods; runs on the current stream."""

    def __init__(self, device: torch.device, pool: Any) -> None:
        self.device, self.pool = device, pool
        self.graph = torch.cuda.CUDAGraph()
        self.ended = False

    def begin(self) -> None:
        self.graph.capture_begin(self.pool, capture_error_mode="thread_local")

    def end(self) -> None:
        self.graph.capture_end()
        self.ended = True

    def abort(self) -> None:
        if self.ended:
            return
        try:
            self.graph.capture_end()  # a failure that was not CUDA's: the capture ends as usual
        except RuntimeError:
            # The host allocator goes on asking this graph whether it captures: it must not die.
            _ABORTED.append(self.graph)
            for undo in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
                with contextlib.suppress(RuntimeError):
                    undo(self.device.index, self.pool)
            if torch.__version__ < "2.12":
                self._free_generators()
        self.graph = torch.cuda.CUDAGraph()

    @staticmethod
    def _free_generators() -> None:
        """Before 2.12 a generator has one flag for all captures, cleared by their regular end."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device="cuda")
        graph.capture_end()

    def replay(self) -> None:
        self.graph.replay()


_ABORTED: list[Any] = []


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection during a capture could free CUDA memory, which ends the capture."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Fixed:
    """Tensors whose storage may not move, as graphs hold their addresses.

    Args:
        owners: The holder of each, its key there, and its name.
    """

    def __init__(self, owners: Sequence[tuple[dict[str, Any], str, str]]) -> None:
        self.owners = [(holder, key, name, holder[key]) for holder, key, name in owners]
        named = [(name, held) for _, _, name, held in self.owners if isinstance(held, Tensor)]
        self.names, self.tensors = [name for name, _ in named], [held for _, held in named]
        self.native = dispatch.EXTENSION.Fixed(self.tensors) if dispatch.HAS_EXTENSION else None
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]

    @classmethod
    def of(cls, model: torch.nn.Module) -> Fixed:
        """Every parameter, buffer and submodule of a module."""
        return cls(
            [
                (holder, key, f"{prefix}.{key}" if prefix else key)
                for prefix, module in model.named_modules()
                for holder in (module._parameters, module._buffers, module._modules)
                for key, held in holder.items()
                if held is not None
            ]
        )

    def moved(self) -> str | None:
        """The name of what was replaced or lies elsewhere now."""
        for holder, key, name, held in self.owners:
            if holder.get(key) is not held:
                return name
        if self.native is not None:
            index = self.native.moved()
            return None if index < 0 else self.names[index]
        for name, tensor, address in zip(self.names, self.tensors, self.addresses, strict=True):
            if tensor.data_ptr() != address:
                return name
        return None
