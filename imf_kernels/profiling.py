"""Named ranges around what the package does, for Nsight (NVTX) and torch.profiler; off by default.

    profiling.enable()          # NVTX, domain "imf_kernels"; or IMF_KERNELS_NVTX=1 at import
    profiling.enable("torch")   # torch.profiler shows "imf_kernels::<name>"
    profiling.disable()

A range is of the host and of its thread: kernels are what it launched. Within `torch.compile` and
`torch.export` there are none, but what was compiled while they were off is compiled again once they
are on. Captures of CUDA graphs show theirs once, replays none of their own.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

import torch

from imf_kernels import checks

DOMAIN = "imf_kernels"
SPANS = {
    "solve": "one call of `sampler.sample`, `GraphSampler.sample` or, with `duplicate_test`, "
    "`F5TTS.sample`; as payload its NFE",
    "rollout": "one call of `Teacher.integrate`, as payload its sub-steps",
    "sub-step": "an Euler step of either, of DSFlow's student in its loss, or of streams: an "
    "evaluation (of streams one or more) and the fused update",
    "evaluation": "the model at `(x, t, r)`; of a guided teacher both branches at once",
    "prepare": "a model's `prepare`: all that depends on the conditions alone",
    "table": "a model's `tables`: all that depends on the times alone",
    "copy-in": "a request's tensors into the static buffers of a graph",
    "replay": "the launch of a request's graphs, its own `prepare` and a new grid's table included",
    "copy-out": "the result out of the static buffers",
    "capture": "three warm-ups and the capture of one graph; the ranges inside are theirs",
    "loss": "an objective's student part; of SplitMeanFlow and MeanFlow the whole call",
    "o3s candidate": "one evaluation of the metric at a grid",
    "checkpoint": "the trainer's writing of a checkpoint, and the exchange between ranks for it",
}
"""Every range, and what it holds."""

Span = AbstractContextManager[object]
P = ParamSpec("P")
T = TypeVar("T")

_OFF: Span = contextlib.nullcontext()
_begin: Callable[[str, int | None], Span] | None = None


def span(name: str, payload: int | None = None) -> Span:
    """A range around a `with` block: one of `SPANS`, with a number that Nsight shows beside it.

    While off it is the same empty context for all.
    """
    begin = _begin
    if begin is None or torch.compiler.is_compiling():
        return _OFF
    return begin(name, payload)


def spanned(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator: `span` around every call."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def within(*args: P.args, **kwargs: P.kwargs) -> T:
            with span(name):
                return function(*args, **kwargs)

        return within

    return decorate


def enable(to: str = "nvtx") -> None:
    """Show the ranges that begin from now on, in all threads; one under way ends as it began.

    Args:
        to: "nvtx": to the tool that the process was started under, at almost no cost without one.
            "torch": to torch.profiler.

    Raises:
        ImportError: "nvtx" without the package `nvtx`.
    """
    global _begin
    checks.choice("to", to, ("nvtx", "torch"))
    _begin = _nvtx() if to == "nvtx" else _torch


def disable() -> None:
    """Show no further range."""
    global _begin
    _begin = None


def enabled() -> bool:
    return _begin is not None


class _Range:
    """An NVTX range without a state of its own: one object for every thread and nesting."""

    def __init__(self, domain: Any, attributes: Any) -> None:
        self.domain, self.attributes = domain, attributes

    def __enter__(self) -> None:
        self.domain.push_range(self.attributes)

    def __exit__(self, *_: object) -> None:
        self.domain.pop_range()


def _nvtx() -> Callable[[str, int | None], Span]:
    try:
        import nvtx
    except ImportError as error:
        raise ImportError(
            "profiling: expected the package nvtx (pip install '.[profile]'), got none"
        ) from error
    domain = nvtx.get_domain(DOMAIN)

    @functools.cache
    def begin(name: str, payload: int | None) -> Span:
        return _Range(domain, domain.get_event_attributes(message=name, payload=payload))

    return begin


def _torch(name: str, payload: int | None) -> Span:
    # unlike `record_function` it goes past the dispatcher: 20 times as fast, and no part of what
    # `make_fx` traces or a dispatch mode sees
    return torch._C._profiler._RecordFunctionFast(f"{DOMAIN}::{name}")


_from_environment = os.environ.get("IMF_KERNELS_NVTX") or "0"
checks.choice("IMF_KERNELS_NVTX", _from_environment, ("0", "1"))
if _from_environment == "1":
    try:
        enable("nvtx")
    except ImportError as error:
        warnings.warn(f"IMF_KERNELS_NVTX=1 has no effect: {error}", RuntimeWarning, stacklevel=2)
