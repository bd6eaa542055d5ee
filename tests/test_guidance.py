import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imf_kernels import checks, guidance
from tests.flows import times


def branches(dtype=torch.float64):
    conditional, unconditional = torch.randn(2, 3, 5, 4, dtype=torch.float64).to(dtype)
    return conditional, unconditional, torch.cat([conditional, unconditional])


def test_defaults_of_the_clients():
    assert guidance.from_f5(2) == 3
    assert guidance.from_cosyvoice(0.7) == pytest.approx(1.7)


@settings(deadline=None, max_examples=30)
@given(s=st.floats(-2, 10))
def test_both_conventions_are_one_w(s):
    conditional, unconditional, doubled = branches()
    f5 = conditional + s * (conditional - unconditional)
    cosyvoice = (1 + s) * conditional - s * unconditional
    torch.testing.assert_close(guidance.combine(doubled, guidance.from_f5(s)), f5)
    torch.testing.assert_close(guidance.combine(doubled, guidance.from_cosyvoice(s)), cosyvoice)


def test_w_1_is_the_conditional_branch_and_0_the_unconditional():
    conditional, unconditional, doubled = branches()
    torch.testing.assert_close(guidance.combine(doubled, 1), conditional)
    torch.testing.assert_close(guidance.combine(doubled, 0.0), unconditional)


def test_w_per_row():
    _, _, doubled = branches()
    w = times(1.0, 2.5, -0.5)
    got = guidance.combine(doubled, w)
    for row, value in enumerate(w.tolist()):
        assert torch.equal(got[row], guidance.combine(doubled, value)[row])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_float32(dtype):
    conditional, unconditional, doubled = branches(dtype)
    got = guidance.combine(doubled, 3.0)
    assert got.dtype == torch.float32
    want = unconditional.double() + 3.0 * (conditional.double() - unconditional.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("w", [None, 1, 3.0, 0.0, torch.ones(2)])
def test_check_lets_good_values_pass(w):
    checks.guidance(w, torch.zeros(2, 3, 4))
