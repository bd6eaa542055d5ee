import pytest
import torch

from imf_kernels.ops.gated_residual import _op, _op_backward, gated_residual
from tests.ops.tools import (
    DEVICE,
    HALF,
    SHAPES,
    assert_compiles_once,
    assert_error_rule,
    backend,
    kernel_backends,
    poisoned_memory,
    with_gradients,
)


def inputs(rows, frames, dim, dtype=torch.float32):
    """x, h, and the gate as a strided view of one modulation."""
    x, h = torch.randn(2, rows, frames, dim, device=DEVICE).to(dtype)
    gate = torch.randn(rows, 6 * dim, device=DEVICE).to(dtype).chunk(6, dim=1)[2]
    return [x, h, gate]


def plain(x, h, gate):
    """Same-dtype PyTorch, as the clients write it."""
    return x + gate[:, None] * h


@pytest.mark.parametrize("name", kernel_backends())
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_follow_the_error_rule(name, dtype, shape):
    args, grad = inputs(*shape, dtype), torch.randn(shape, device=DEVICE).to(dtype)
    exact = with_gradients(plain, [a.double() for a in args], grad.double())
    same_dtype = with_gradients(plain, args, grad)
    with backend(name), poisoned_memory():
        ours = with_gradients(gated_residual, args, grad)
    for got, allowed, true in zip(ours, same_dtype, exact, strict=True):
        assert got.dtype == dtype
        assert_error_rule(got, allowed, true, atol=1e-6 * shape[1] * float(true.abs().max()))


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
def test_branch_may_be_narrower_than_the_stream(name):
    """As under autocast: a float32 stream, a bfloat16 branch."""
    x, h, gate = inputs(2, 5, 8)
    with backend(name):
        y = gated_residual(x, h.bfloat16(), gate)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, plain(x, h.bfloat16().float(), gate))


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
def test_strided_views(name):
    """Transposed frames, and a gradient that comes in transposed."""
    args, grad = inputs(2, 12, 10), torch.randn(2, 12, 10, device=DEVICE)
    expected = with_gradients(gated_residual, args, grad)
    views = [a.mT.contiguous().mT if a.ndim == 3 else a for a in args]
    with backend(name):
        got = with_gradients(gated_residual, views, grad.mT.contiguous().mT)
    for ours, want in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
def test_gradcheck(name):
    args = [a.double().requires_grad_() for a in inputs(2, 3, 5)]
    with backend(name):
        assert torch.autograd.gradcheck(gated_residual, args)


@pytest.mark.parametrize("name", kernel_backends())
def test_gradients_are_deterministic(name):
    args, grad = inputs(2, 70, 64), torch.randn(2, 70, 64, device=DEVICE)
    with backend(name):
        first, second = (with_gradients(gated_residual, args, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_empty(name, shape):
    with backend(name):
        output, *grads = with_gradients(
            gated_residual, inputs(*shape), torch.zeros(shape, device=DEVICE)
        )
    assert output.shape == shape
    assert all(float(grad.abs().sum()) == 0 for grad in grads)


@pytest.mark.parametrize("name", kernel_backends())
def test_opcheck(name):
    x, h, gate = inputs(2, 5, 12)
    with backend(name):
        torch.library.opcheck(_op, (x.requires_grad_(), h, gate))
        torch.library.opcheck(_op_backward, (torch.randn_like(h), h, gate))


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
def test_compiles_without_graph_breaks_or_recompiles(name):
    with backend(name):
        assert_compiles_once(gated_residual, *(inputs(2, frames, 12) for frames in (7, 12, 33)))


@pytest.mark.parametrize("name", kernel_backends())
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_forward_mode_ad_is_refused(name, argument):
    args = inputs(1, 3, 4)

    def run(value):
        return gated_residual(*args[:argument], value, *args[argument + 1 :])

    tangent = torch.ones_like(args[argument])
    with backend(name), pytest.raises(RuntimeError, match="forward-mode AD"):
        torch.func.jvp(run, (args[argument],), (tangent,))
