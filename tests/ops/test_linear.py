import pytest
import torch
from torch.nn import functional as F

from imf_kernels.ops import linear
from tests.ops.tools import DEVICE, HALF, assert_compiles_once, assert_error_rule, backend


def inputs(dtype=torch.float32, rows=37, bias=True):
    x, weight = torch.randn(rows, 48, device=DEVICE), torch.randn(40, 48, device=DEVICE) / 7
    b = torch.randn(40, device=DEVICE) if bias else None
    return [None if t is None else t.to(dtype) for t in (x, weight, b)]


def plain(x, weight, bias, gelu=False):
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_outputs_follow_the_error_rule(name, dtype, gelu, bias, grad):
    args = inputs(dtype, bias=bias)
    exact = plain(*(None if a is None else a.double() for a in args), gelu)
    if grad:
        args[1].requires_grad_()
    with backend(name):
        got = linear(*args, gelu)
    assert got.requires_grad == grad
    assert got.dtype == dtype
    assert_error_rule(got.detach(), plain(*args, gelu).detach(), exact, atol=1e-5)


def test_the_gelu_is_the_tanh_one():
    """The exact one is 5e-4 away where they differ most."""
    x = torch.linspace(-4, 4, 101, device=DEVICE)[:, None].expand(-1, 16).contiguous()
    got = linear(x, torch.eye(16, device=DEVICE), torch.zeros(16, device=DEVICE), gelu=True)
    torch.testing.assert_close(got, F.gelu(x, approximate="tanh"), rtol=0, atol=1e-5)


def test_slices_empty_batches_and_autocast():
    x, weight, bias = inputs()
    torch.testing.assert_close(
        linear(x[:, 8:], weight[:, 8:], bias), plain(x[:, 8:], weight[:, 8:], bias)
    )
    assert linear(x[:0], weight, bias, gelu=True).shape == (0, 40)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert linear(x, weight, bias, gelu=True).dtype == torch.bfloat16


def test_weights_are_read_as_they_are():
    """Whatever is done to them: nothing derived is kept."""
    x, weight, bias = inputs()
    linear(x, weight, bias)
    weight.data.mul_(2)
    torch.testing.assert_close(linear(x, weight, bias), plain(x, weight, bias))


@pytest.mark.parametrize("gelu", [False, True])
def test_compiles_without_graph_breaks_or_recompiles(gelu):
    calls = ((inputs(rows=rows)) for rows in (7, 12, 33))
    assert_compiles_once(lambda *args: linear(*args, gelu), *calls)
