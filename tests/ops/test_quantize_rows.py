import math

import pytest
import torch

from imf_kernels.ops import Quantized, quantize_rows
from imf_kernels.ops.quantize_rows import FP8, _op
from tests.ops.tools import (
    DEVICE,
    HALF,
    assert_compiles_once,
    backend,
    kernel_backends,
    poisoned_memory,
)

BACKENDS = ["reference", *kernel_backends()]
SMALLEST = 2.0**-126


def codes(*numbers: float) -> list[float]:
    """What the numbers are in e4m3, in a row whose largest number is 448."""
    got = quantize_rows(torch.tensor([[448.0, *numbers]], device=DEVICE))
    assert got.scale.tolist() == [[1.0]]
    return got.float()[0, 1:].tolist()


@pytest.mark.parametrize("name", BACKENDS)
class TestClosedForms:
    def test_powers_of_two_are_exact(self, name):
        powers = torch.tensor([2.0**k for k in range(-6, 9)], device=DEVICE)
        for scale in (2.0**-100, 2.0**-3, 1.0, 2.0**90):
            # 1.75 * 2^8 is 448: the scale is a power of two as well
            row = torch.cat([powers, -powers, powers.new_tensor([448.0, 0.0])]) * scale
            with backend(name):
                q, found = quantize_rows(row[None])
            assert found.item() == scale
            assert torch.equal(q.float() * found, row[None])

    def test_nearest_with_ties_to_even(self, name):
        with backend(name):
            # steps of 2 from 16 to 32, of 2^-9 below 2^-6, which the last one rounds up to
            assert codes(17.0, 19.0, 18.9, -21.0) == [16.0, 20.0, 18.0, -20.0]
            steps = [0.49, 0.5, 0.51, 1.5, 2.5, 7.4, 7.6]
            assert codes(*(s * 2**-9 for s in steps)) == [
                s * 2**-9 for s in (0.0, 0.0, 1.0, 2.0, 2.0, 7.0, 8.0)
            ]

    def test_every_code_comes_back(self, name):
        every = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(FP8).float()
        every = every[every.isfinite()]
        assert len(every) == 254
        with backend(name):
            q, scale = quantize_rows(every[None])
        assert scale.item() == 1
        assert torch.equal(q.float(), every[None])

    def test_between_the_codes(self, name):
        """Halfway, and on either side of it, from every number to the next."""
        every = torch.arange(127, dtype=torch.uint8, device=DEVICE).view(FP8).float()
        halfway = (every[:-1] + every[1:]) / 2
        up, down = torch.full_like(halfway, 1e9), torch.full_like(halfway, -1e9)
        x = torch.cat([halfway, halfway.nextafter(up), halfway.nextafter(down)])
        x = torch.cat([x, -x, every[-1:]])[None]
        with backend(name):
            q, _ = quantize_rows(x)
        assert torch.equal(q.float(), x.to(FP8).float())

    def test_the_largest_number_is_448(self, name):
        x = torch.randn(50, 33, device=DEVICE)
        with backend(name):
            q, scale = quantize_rows(x)
        assert torch.equal(q.float().abs().amax(1), torch.full((50,), 448.0, device=DEVICE))
        largest = x.abs().amax(1, keepdim=True)
        torch.testing.assert_close(scale, largest / 448, rtol=1e-6, atol=0)

    def test_rows_of_zeros_and_of_next_to_nothing(self, name):
        x = torch.zeros(3, 20, device=DEVICE)
        x[1] = 1e-44  # less than e4m3's least step times the smallest scale
        x[2] = torch.finfo(torch.float32).max
        with backend(name):
            q, scale = quantize_rows(x)
        assert scale[:2].tolist() == [[SMALLEST]] * 2
        assert not q[:2].float().any()
        assert torch.equal(q[2].float(), torch.full((20,), 448.0, device=DEVICE))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("gelu", [False, True])
    def test_what_is_not_finite_stays_in_its_row(self, name, bad, gelu):
        x = torch.randn(3, 20, device=DEVICE)
        x[1, 7] = bad
        with backend(name):
            got = quantize_rows(x, gelu)
        assert got.float()[1].isnan().any()
        assert got.float()[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (17, 80), (63, 100), (3, 1000)])
def test_within_half_a_step(name, dtype, gelu, rows, width):
    x = (3 * torch.randn(rows, width, device=DEVICE)).to(dtype)
    with backend(name), poisoned_memory():
        got = quantize_rows(x, gelu)
    assert (got.q.dtype, got.q.shape) == (FP8, (rows, width))
    assert (got.scale.dtype, got.scale.shape) == (torch.float32, (rows, 1))
    exact = x.double()
    if gelu:
        exact = torch.nn.functional.gelu(exact, approximate="tanh")
    # 3 bits after the leading one, or 2^-9 of the scale, and what float32 rounds of a GELU
    allowed = (exact.abs() / 16).maximum(got.scale.double() * 2**-10) * (1 + 1e-6)
    allowed += 1e-6 * x.double().abs()
    error = (got.q.double() * got.scale.double() - exact).abs()
    assert (error <= allowed).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_do_not_depend_on_their_neighbours(name):
    x = torch.randn(9, 48, device=DEVICE)
    with backend(name):
        batch = quantize_rows(x)
        for i in range(9):
            alone = quantize_rows(x[i : i + 1])
            assert torch.equal(alone.float(), batch.float()[i : i + 1])


@pytest.mark.parametrize("name", BACKENDS)
def test_strided_and_empty(name):
    x = torch.randn(20, 30, device=DEVICE)
    with backend(name):
        assert torch.equal(quantize_rows(x.mT).float(), quantize_rows(x.mT.contiguous()).float())
        offset = x[3:, 5:25]
        assert torch.equal(
            quantize_rows(offset).float(), quantize_rows(offset.contiguous()).float()
        )
        empty = quantize_rows(x[:0])
    assert (empty.q.shape, empty.scale.shape) == ((0, 30), (0, 1))


@pytest.mark.parametrize("name", kernel_backends())
def test_opcheck(name):
    with backend(name):
        torch.library.opcheck(_op, (torch.randn(5, 16, device=DEVICE), True))


@pytest.mark.parametrize("name", BACKENDS)
def test_compiles_without_graph_breaks_or_recompiles(name):
    def run(x):
        return quantize_rows(x, gelu=True).float()

    with backend(name):
        assert_compiles_once(run, *((torch.randn(rows, 32, device=DEVICE),) for rows in (5, 8, 33)))


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_are_refused(name):
    x = torch.randn(3, 16, device=DEVICE, requires_grad=True)
    with backend(name):
        with pytest.raises(ValueError, match=r"x: expected a tensor without gradient .* got req"):
            quantize_rows(x)
        with torch.no_grad():
            assert isinstance(quantize_rows(x), Quantized)
