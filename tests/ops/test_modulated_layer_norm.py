import pytest
import torch

from imf_kernels.ops.modulated_layer_norm import (
    _op,
    _op_backward,
    _reference_backward,
    modulated_layer_norm,
    reference,
)
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
    """x, and shift and scale as strided views of one modulation."""
    x = (2 * torch.randn(rows, frames, dim, device=DEVICE) + 0.5).to(dtype)
    modulation = torch.randn(rows, 6 * dim, device=DEVICE).to(dtype)
    _, shift, _, scale, _, _ = modulation.chunk(6, dim=1)
    return [x, shift, scale]


def plain(x, shift, scale):
    """Same-dtype PyTorch, as the clients write it."""
    norm = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    return norm * (1 + scale[:, None]) + shift[:, None]


@pytest.mark.parametrize("name", kernel_backends())
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_follow_the_error_rule(name, dtype, shape):
    args, grad = inputs(*shape, dtype), torch.randn(shape, device=DEVICE).to(dtype)
    exact = with_gradients(plain, [a.double() for a in args], grad.double())
    same_dtype = with_gradients(plain, args, grad)
    with backend(name), poisoned_memory():
        ours = with_gradients(modulated_layer_norm, args, grad)
    for got, allowed, true in zip(ours, same_dtype, exact, strict=True):
        assert got.dtype == dtype
        assert_error_rule(got, allowed, true, atol=1e-6 * shape[1] * float(true.abs().max()))


def test_closed_form():
    x = torch.tensor([[[1.0, 3.0]]], device=DEVICE)
    shift, scale = torch.tensor([[10.0, 20.0]]), torch.tensor([[0.0, 1.0]])
    y = modulated_layer_norm(x, shift.to(DEVICE), scale.to(DEVICE), eps=0.0)
    torch.testing.assert_close(y, torch.tensor([[[9.0, 22.0]]], device=DEVICE))


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
def test_strided_views(name):
    """Transposed frames, and a gradient that comes in transposed."""
    args, grad = inputs(2, 12, 10), torch.randn(2, 12, 10, device=DEVICE)
    expected = with_gradients(modulated_layer_norm, args, grad)
    views = [a.mT.contiguous().mT if a.ndim == 3 else a for a in args]
    with backend(name):
        got = with_gradients(modulated_layer_norm, views, grad.mT.contiguous().mT)
    for ours, want in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
def test_gradcheck(name):
    args = [a.double().requires_grad_() for a in inputs(2, 3, 5)]
    with backend(name):
        assert torch.autograd.gradcheck(modulated_layer_norm, args)


def test_written_backward_equals_autograd():
    args, grad = inputs(2, 7, 6), torch.randn(2, 7, 6, device=DEVICE)
    expected = with_gradients(reference, args, grad)[1:]
    for got, want in zip(_reference_backward(grad, *args, 1e-6), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", kernel_backends())
def test_gradients_are_deterministic(name):
    args, grad = inputs(2, 70, 64), torch.randn(2, 70, 64, device=DEVICE)
    with backend(name):
        first, second = (with_gradients(modulated_layer_norm, args, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_empty(name, shape):
    with backend(name):
        output, *grads = with_gradients(
            modulated_layer_norm, inputs(*shape), torch.zeros(shape, device=DEVICE)
        )
    assert output.shape == shape
    assert all(float(grad.abs().sum()) == 0 for grad in grads)


@pytest.mark.parametrize("name", kernel_backends())
def test_opcheck(name):
    x, shift, scale = inputs(2, 5, 12)
    with backend(name):
        torch.library.opcheck(_op, (x.requires_grad_(), shift, scale, 1e-6))
        torch.library.opcheck(_op_backward, (torch.randn_like(x), x.detach(), shift, scale, 1e-6))


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
def test_compiles_without_graph_breaks_or_recompiles(name):
    with backend(name):
        calls = (inputs(2, frames, 12) for frames in (7, 12, 33))
        assert_compiles_once(modulated_layer_norm, *calls)


def test_jvp_on_the_reference():
    args = [a.double() for a in inputs(1, 3, 4)]
    tangents = [torch.randn_like(a) for a in args]
    step = 1e-6
    with backend("reference"):
        _, tangent = torch.func.jvp(modulated_layer_norm, tuple(args), tuple(tangents))
        ahead, behind = (
            modulated_layer_norm(*(a + s * d for a, d in zip(args, tangents, strict=True)))
            for s in (step, -step)
        )
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", kernel_backends())
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_forward_mode_ad_is_refused(name, argument):
    args = inputs(1, 3, 4)

    def run(value):
        return modulated_layer_norm(*args[:argument], value, *args[argument + 1 :])

    tangent = torch.ones_like(args[argument])
    with backend(name), pytest.raises(RuntimeError, match="forward-mode AD"):
        torch.func.jvp(run, (args[argument],), (tangent,))
