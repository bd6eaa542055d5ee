"""Which implementation an op runs: a fused kernel or the plain-PyTorch reference.

By default CUDA tensors take the Triton kernels and everything else the reference, or the C++
kernel where one exists and is built. `IMF_KERNELS_BACKEND=reference|cpp|triton` forces a path for
the process, `with backend("reference")` for a scope (forward-mode AD needs it).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.autograd import forward_ad

from imf_kernels import checks

CHOICES = ("auto", "reference", "cpp", "triton")


_from_environment = os.environ.get("IMF_KERNELS_BACKEND", "auto")
checks.choice("IMF_KERNELS_BACKEND", _from_environment, CHOICES)
_forced: ContextVar[str] = ContextVar("imf_kernels_backend", default=_from_environment)


def forced() -> str:
    """The choice in this scope, "auto" by default."""
    return _forced.get()


def constant_to_dynamo(function: Any) -> None:
    """Let `torch.compile` take the function's result, here a ContextVar's, as a constant.

    `torch.compiler.assume_constant_result` does just this, but importing dynamo for it costs every
    import of the package more than a second.
    """
    function._dynamo_marked_constant = True


constant_to_dynamo(forced)


def _load_extension() -> Any:
    if importlib.util.find_spec("imf_kernels._C") is None:
        return None
    try:
        return importlib.import_module("imf_kernels._C")
    except ImportError as error:  # built against another torch
        warnings.warn(
            f"imf_kernels runs without its C++ extension, which does not load: {error}. "
            "Reinstall with `pip install --no-build-isolation` to build it for this torch.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


EXTENSION: Any = _load_extension()
"""The module imf_kernels._C, or None."""
HAS_EXTENSION = EXTENSION is not None
HAS_CUDA_EXTENSION = HAS_EXTENSION and EXTENSION.CUDA
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the scope, run every op on `name`: "auto", "reference", "cpp" or "triton".

    "cpp" applies to the ops that have a C++ kernel; the others keep their default. A function under
    `torch.compile` keeps the choice between kernel and reference that it was traced with.
    """
    checks.choice("backend", name, CHOICES)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def backends() -> dict[str, str | bool]:
    """The forced choice, which implementations this installation has, and what runs "attention"."""
    installed = {
        "forced": forced(),
        "triton": HAS_TRITON,
        "triton_interpreted": INTERPRETED,
        "cpp": HAS_EXTENSION,
        "cpp_cuda": HAS_CUDA_EXTENSION,
    }
    return installed | {name: path() for name, path in _reports.items()}


_reports: dict[str, Callable[[], str]] = {}


def report(name: str, path: Callable[[], str]) -> None:
    """Let `backends` say which path an op takes that has several on one device."""
    _reports[name] = path


def has_extension(cuda: bool) -> bool:
    """Whether the C++ extension is there, for CUDA tensors or for those of the CPU."""
    return HAS_CUDA_EXTENSION if cuda else HAS_EXTENSION


def use_kernel(x: Tensor, *others: Tensor | None, cpp: bool = False, aten: bool = False) -> bool:
    """Whether the op on these tensors runs its registered kernel (else: its reference).

    `cpp` says that the op has a C++ kernel for these tensors on the CPU, `aten` that it is built on
    PyTorch's own kernels there.

    Raises:
        RuntimeError: a forced backend that cannot run here, or a dual tensor on a kernel, through
            which forward-mode AD would return a zero tangent without a word.
    """
    choice = forced()
    if choice == "cpp" and not HAS_EXTENSION:
        raise RuntimeError("backend: 'cpp' needs the C++ extension, which is not built")
    if choice in ("auto", "cpp"):
        kernel = triton_runs() if x.is_cuda else aten or (cpp and HAS_EXTENSION)
    elif choice == "triton":
        kernel = True
        if not HAS_TRITON or not (x.is_cuda or INTERPRETED):
            raise RuntimeError(
                "backend: 'triton' needs triton and CUDA tensors, or TRITON_INTERPRET=1 at import; "
                f"got a tensor on {x.device}"
            )
    else:
        kernel = False
    if kernel and not torch.compiler.is_compiling():
        _refuse_dual(x, *others)
    return kernel


def triton_runs() -> bool:
    """Whether Triton can launch here: it builds its driver with a C compiler at first use."""
    return _triton_starts()


constant_to_dynamo(triton_runs)


@functools.cache
def _triton_starts() -> bool:
    if not HAS_TRITON:
        return False
    try:
        importlib.import_module("triton").runtime.driver.active.get_current_target()
    except Exception as error:  # whatever a broken toolchain raises
        warnings.warn(
            f"imf_kernels runs its plain-PyTorch reference: Triton does not start here: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def may_probe() -> bool:
    """Whether a device may be asked by running something on it: not while capturing, nor where
    tensors are fake."""
    return not torch.cuda.is_current_stream_capturing() and detect_fake_mode() is None


@contextlib.contextmanager
def probing() -> Iterator[None]:
    """Within the scope the host may wait for the device, whatever `torch.cuda` was told of that."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(0)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def runs_triton(x: Tensor) -> bool:
    """Whether a registered op's kernel for `x` is the Triton one (decided inside the op)."""
    if x.is_cuda:
        return True
    return INTERPRETED and forced() == "triton"


def dual_level() -> bool:
    """Whether forward-mode AD is under way."""
    return forward_ad._current_level >= 0


def _refuse_dual(*tensors: Tensor | None) -> None:
    if not dual_level():
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                "forward-mode AD through a fused kernel would return a zero tangent: "
                'run it within `with imf_kernels.backend("reference")`'
            )
