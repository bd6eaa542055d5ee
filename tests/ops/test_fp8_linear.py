import pytest
import torch

from imf_kernels.ops import Quantized, fp8_linear, quantize_rows
from tests.ops.tools import DEVICE, assert_compiles_once, backend


def operands(frames: int, width: int, out: int):
    x, weight = (torch.randn(rows, width, device=DEVICE) for rows in (frames, out))
    # frames and channels of very different sizes, which a scale for all would lose
    x *= torch.logspace(-3, 3, frames, device=DEVICE)[:, None]
    weight *= torch.logspace(-2, 2, out, device=DEVICE)[:, None]
    bias = torch.randn(out, device=DEVICE).bfloat16()
    return quantize_rows(x), quantize_rows(weight), bias, x, weight


def double(operand: Quantized) -> torch.Tensor:
    return operand.q.double() * operand.scale.double()


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("frames", [1, 17, 63, 100, 1000])
@pytest.mark.parametrize("with_bias", [True, False])
def test_is_the_product_of_what_was_quantised(name, frames, with_bias):
    x, weight, bias, *_ = operands(frames, 64, 48)
    with backend(name):
        y = fp8_linear(x, weight, bias if with_bias else None)
    assert (y.dtype, y.shape) == (torch.bfloat16, (frames, 48))
    exact = double(x) @ double(weight).T + (bias.double() if with_bias else 0)
    # rounded to bfloat16, and what a sum of FP8 products may lose on the way
    size = double(x).abs() @ double(weight).abs().T
    assert ((y.double() - exact).abs() <= exact.abs() / 256 + size * 2**-12 + 1e-30).all()


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_error_of_both_operands_is_that_of_e4m3(name):
    """A step is 1/16 to 1/8 of a number: 2.6 % RMS each, independent, 3.7 % together."""
    x, weight, _, exact_x, exact_weight = operands(200, 256, 128)
    with backend(name):
        y = fp8_linear(x, weight, None)
    exact = exact_x.double() @ exact_weight.double().T
    error = (y.double() - exact) / (exact_x.norm(dim=1)[:, None] * exact_weight.norm(dim=1))
    reach = exact / (exact_x.norm(dim=1)[:, None] * exact_weight.norm(dim=1))
    assert 0.03 < float(error.square().mean().sqrt() / reach.square().mean().sqrt()) < 0.045


def test_no_frames():
    x, weight, bias, *_ = operands(3, 32, 16)
    y = fp8_linear(Quantized(x.q[:0], x.scale[:0]), weight, bias)
    assert (y.dtype, y.shape) == (torch.bfloat16, (0, 16))


def test_nan_stays_in_its_row():
    x = torch.randn(4, 32, device=DEVICE)
    x[2, 5] = torch.nan
    _, weight, bias, *_ = operands(3, 32, 16)
    y = fp8_linear(quantize_rows(x), weight, bias)
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].isfinite().all()


def test_compiles_without_graph_breaks_or_recompiles():
    _, weight, bias, *_ = operands(1, 32, 16)

    def run(x):
        return fp8_linear(quantize_rows(x), weight, bias)

    assert_compiles_once(run, *((torch.randn(frames, 32, device=DEVICE),) for frames in (5, 8, 33)))


def test_sizes_are_multiples_of_16():
    for frames, width, out in ((3, 24, 16), (3, 32, 24)):
        x, weight, bias, *_ = operands(frames, width, out)
        with pytest.raises(ValueError, match=r"weight\.q: expected multiples of 16, got \("):
            fp8_linear(x, weight, bias)
