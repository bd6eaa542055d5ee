"""What the op tests share: inputs, backends, and flash-attention's error rule."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import imf_kernels
from imf_kernels import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1, 3), (2, 17, 80), (3, 63, 100), (1, 100, 192), (2, 33, 256)]
HALF = [torch.bfloat16, torch.float16]


def kernel_backends(cpp: bool = False) -> list:
    """The backends that run a kernel here, as pytest parameters."""
    triton = dispatch.HAS_TRITON and (DEVICE == "cuda" or dispatch.INTERPRETED)
    params = [pytest.param("triton", marks=[] if triton else pytest.mark.skip("no triton"))]
    if cpp:
        built = dispatch.HAS_EXTENSION and DEVICE == "cpu"
        reason = "the C++ extension is not built, or the device is not the CPU"
        params.append(pytest.param("cpp", marks=[] if built else pytest.mark.skip(reason)))
    return params


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor starts as NaN: a value that a kernel forgot to write shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    mode = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def assert_error_rule(ours: Tensor, plain: Tensor, exact: Tensor, atol: float = 1e-6) -> None:
    """Error against the exact result at most twice that of same-dtype PyTorch, plus `atol`."""
    if dispatch.INTERPRETED and ours.dtype == torch.bfloat16 and ours.numel():
        # the interpreter truncates to bfloat16 where a GPU rounds: one unit in the last place
        atol += torch.finfo(ours.dtype).eps * float(exact.abs().max())
    error = (ours.double() - exact.double()).abs().max() if ours.numel() else torch.tensor(0.0)
    allowed = (plain.double() - exact.double()).abs().max() if ours.numel() else torch.tensor(0.0)
    assert torch.isfinite(ours).all()
    assert error <= 2 * allowed + atol, f"error {error:.3e}, plain PyTorch {allowed:.3e}"


def with_gradients(run: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output and every input's gradient; inputs may be views of leaves."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = run(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))]


def assert_compiles_once(run: Callable[..., Tensor], *calls: tuple) -> None:
    """`fullgraph=True`, one graph for all the calls once sizes are dynamic, equal to eager."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=count)
    for args in calls:
        torch.testing.assert_close(compiled(*args), run(*args))
    assert len(graphs) == 1, f"{len(graphs)} graphs for {len(calls)} calls"


backend = imf_kernels.backend
