import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from imf_kernels import Teacher, grids
from imf_kernels.sampler import sample
from tests.flows import FLOWS, GUIDED, Flow, Linear

UNIT = st.integers(1, 1023).map(lambda k: k / 1024)


def noise(rows=2, frames=5, channels=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, frames, channels, generator=generator, dtype=dtype)


def end(flow: Flow, x, t=0.0, r=1.0):
    return flow.carry(x, x.new_full((x.shape[0],), t), x.new_full((x.shape[0],), r))


# -- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(FLOWS))
@settings(deadline=None, max_examples=25)
@given(inner=st.lists(UNIT, max_size=8, unique=True))
def test_exact_student_is_exact_on_any_grid(name, inner):
    flow, x = FLOWS[name], noise()
    got = sample(flow.student(), x, grid=[0.0, *sorted(inner), 1.0])
    # a grid is float32: the length of a step is good to 6e-8
    torch.testing.assert_close(got, end(flow, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grid", list(grids.NAMED))
@pytest.mark.parametrize("nfe", [1, 2, 3, 16])
def test_exact_student_is_exact_at_any_nfe(grid, nfe):
    flow, x = FLOWS["gaussian"], noise()
    got = sample(flow.student(), x, grid=grid, nfe=nfe)
    torch.testing.assert_close(got, end(flow, x), rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(inner=st.lists(UNIT, max_size=40, unique=True))
def test_steps_sum_to_one(inner):
    x = torch.zeros(1, 1, 1, dtype=torch.float64)
    got = sample(Linear(0.0, 1.0), x, grid=[0.0, *sorted(inner), 1.0])
    assert float(got) == pytest.approx(1, abs=1e-6)


def test_teacher_converges_at_first_order():
    flow, x = FLOWS["gaussian"], noise()
    want = end(flow, x)
    error = [(sample(flow, x, nfe=nfe) - want).norm() for nfe in (64, 128)]
    assert 1.9 < error[0] / error[1] < 2.1


def test_equals_the_teacher_rollout_over_the_whole():
    flow, x = GUIDED["gaussian"], noise()
    cond = flow.prepare(torch.tensor([5, 3]), guided=True)
    grid = torch.tensor([0.0, 0.3, 0.4, 1.0])
    run = Teacher(flow, 2.0).integrate(
        x, x.new_zeros(2), x.new_ones(2), 3, cond, spacing=grid, keep=True
    )
    torch.testing.assert_close(sample(flow, x, cond, grid, guidance=2.0), run.z)
    states = sample(flow, x, cond, grid, guidance=2.0, intermediates=True)
    torch.testing.assert_close(states, run.states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_guided_teacher(dtype):
    flow, x = GUIDED["linear"], noise(dtype=dtype)
    cond = flow.prepare(torch.full((2,), 5), guided=True)
    w = torch.tensor([1.5, 3.0], dtype=dtype)
    got = sample(flow, x, cond, nfe=4, guidance=w)
    for row, value in enumerate(w.tolist()):
        torch.testing.assert_close(got[row], sample(flow.at(value), x, nfe=4)[row])
        torch.testing.assert_close(got[row], sample(flow, x, cond, nfe=4, guidance=value)[row])


# -- what it returns and calls --------------------------------------------------------------------


def test_intermediates():
    flow, x = FLOWS["gaussian"], noise()
    grid = [0.0, 0.2, 0.7, 1.0]
    states = sample(flow.student(), x, grid=grid, intermediates=True)
    assert states.shape == (4, *x.shape)
    assert torch.equal(states[0], x)
    assert torch.equal(states[-1], sample(flow.student(), x, grid=grid))
    for state, time in zip(states, grid, strict=True):
        torch.testing.assert_close(state, end(flow, x, r=time), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("progress", [False, True])
def test_callback_sees_every_step_in_order(progress, capsys):
    if progress:
        pytest.importorskip("rich")
    x, seen = noise(), []
    states = sample(
        FLOWS["linear"],
        x,
        nfe=4,
        intermediates=True,
        progress=progress,
        callback=lambda k, x: seen.append((k, x)),
    )
    assert [k for k, _ in seen] == [0, 1, 2, 3]
    for k, x in seen:
        assert torch.equal(x, states[k + 1])


def test_model_is_asked_on_the_grid():
    flow, x = Linear(1.0, 0.0), noise(dtype=torch.float32)
    grid = grids.sway(3)
    sample(flow, x, grid=grid)
    assert len(flow.asked) == 3
    for k, (t, r) in enumerate(flow.asked):
        assert t.dtype == r.dtype == torch.float32
        assert t.tolist() == [grid[k].item()] * 2
        assert r.tolist() == [grid[k + 1].item()] * 2


def test_noise_is_left_alone():
    x = noise(dtype=torch.float32)
    before = x.clone()
    sample(FLOWS["linear"], x, nfe=2)
    assert torch.equal(x, before)


def test_state_is_float32_whatever_the_model_computes_in():
    class Half:
        dtype = torch.bfloat16

        def __call__(self, x, t, r, cond):
            assert x.dtype == torch.bfloat16
            return x / 3

    x = noise(dtype=torch.float32)
    got = sample(Half(), x, nfe=3)
    assert got.dtype == torch.float32
    assert not torch.equal(got, got.bfloat16().float())


# -- rows and padding -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(deadline=None, max_examples=20)
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4))
def test_batch_equals_its_rows(dtype, lengths):
    flow = GUIDED["gaussian"]
    x = noise(rows=len(lengths), frames=7, dtype=dtype)
    cond = flow.prepare(torch.tensor(lengths), guided=True)
    got = sample(flow, x, cond, "sway", nfe=3, guidance=2.0)
    for row, frames in enumerate(lengths):
        alone = sample(
            flow,
            x[row : row + 1, :frames],
            flow.prepare(torch.tensor([frames]), guided=True),
            "sway",
            nfe=3,
            guidance=2.0,
        )
        torch.testing.assert_close(got[row : row + 1, :frames], alone, rtol=1e-6, atol=1e-6)
        assert torch.equal(got[row, frames:], x[row, frames:])


# -- gradients ------------------------------------------------------------------------------------


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.state, self.time = (
            nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (-0.7, 0.4)
        )

    def forward(self, x, t, r, cond):
        u = torch.tanh(self.state * x) + (self.time * (t + 2 * r))[:, None, None].to(x.dtype)
        return torch.cat([u, u.square()]) if cond is not None else u


@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("intermediates", [False, True])
def test_gradients_equal_a_loop_by_hand(guidance, intermediates):
    model, grid = Student(), torch.tensor([0.0, 0.25, 0.75, 1.0])
    x0 = noise().requires_grad_()
    lengths = torch.tensor([5, 2])
    cond = None if guidance is None else {"lengths": lengths.repeat(2)}
    weights = torch.randn(4, *x0.shape, dtype=torch.float64)
    inside = (torch.arange(5) < lengths[:, None])[:, :, None]

    x, states = x0, [x0]
    for t, r in itertools.pairwise(grid):
        u = model(x, t.expand(2), r.expand(2), cond)
        if guidance is not None:
            u = torch.where(inside, u[2:] + guidance * (u[:2] - u[2:]), 0.0)
        x = x + (r - t) * u
        states.append(x)
    by_hand = (torch.stack(states) * weights).sum() if intermediates else (x * weights[0]).sum()

    got = sample(model, x0, cond, grid, guidance=guidance, intermediates=intermediates, grad=True)
    loss = (got * (weights if intermediates else weights[0])).sum()
    leaves = (x0, *model.parameters())
    for mine, want in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(by_hand, leaves), strict=True
    ):
        torch.testing.assert_close(mine, want)


def test_no_gradient_unless_asked():
    model, x = Student(), noise().requires_grad_()
    seen = []
    got = sample(model, x, nfe=2, callback=lambda k, x: seen.append(x.requires_grad))
    assert not got.requires_grad
    assert seen == [False, False]
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert sample(model, x, nfe=2, grad=True).requires_grad
