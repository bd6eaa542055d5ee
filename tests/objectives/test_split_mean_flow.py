import pytest
import torch

from imf_kernels import SplitMeanFlow, Teacher
from imf_kernels.objectives import Intervals
from imf_kernels.objectives.split_mean_flow import split_target
from tests.flows import FLOWS, GUIDED, Linear, MeanVelocity, times
from tests.objectives.tools import Scale, batch, seeded


@pytest.mark.parametrize("name", ["linear", "gaussian", "constant"])
def test_exact_student_has_no_loss(name):
    flow = FLOWS[name]
    for seed in range(3):
        loss, info = SplitMeanFlow(Teacher(flow), generator=seeded(seed))(flow.student(), batch(40))
        assert float(loss) < 1e-24
        assert info["row_error"].max() < 1e-24
        assert 0.5 < info["scale"] <= 1.5


@pytest.mark.parametrize("name", ["linear", "gaussian"])
def test_boundary_rows_get_the_guided_velocity(name):
    flow = GUIDED[name]
    objective = SplitMeanFlow(Teacher(flow, 2.0), generator=seeded())
    loss, info = objective(flow.at(2.0).student(), batch(40))
    assert float(loss) < 1e-24
    instant = info["interval"] == 0
    assert 10 < instant.sum() < 30
    _, info = objective(flow.at(1.0).student(), batch(40))
    instant = info["interval"] == 0
    assert info["row_error"][instant].min() > 1e-6, "another guidance"
    assert info["row_error"][~instant].max() < 1e-24, "consistent with itself"


def test_any_split_of_an_exact_student_is_its_mean_velocity():
    flow = FLOWS["gaussian"]
    z, t, r = batch(4).x1, times(0.0, 0.2, 0.3, 0.999), times(1.0, 0.9, 0.3, 1.0)
    want = flow.mean_velocity(z, t, r)
    for share in (0.0, 1e-9, 0.3, 1.0):
        target = split_target(flow.mean_velocity, z, t, r, torch.full_like(t, share))
        torch.testing.assert_close(target, want, rtol=1e-12, atol=1e-12)


def test_a_vanishing_split_asks_for_mean_flows_identity():
    """`(target - u) / share` tends to `u(z, t, t) + (r - t) du/dt - u`, for any student."""

    def student(z, t, r):
        t, r = t[:, None, None], r[:, None, None]
        return torch.sin(z + 2 * t) * (1 + r - t) + r * t

    z, t, r = batch(3).x1, times(0.1, 0.4, 0.7), times(0.9, 0.6, 0.8)
    v, u = student(z, t, t), student(z, t, r)
    _, slope = torch.func.jvp(lambda z, t: student(z, t, r), (z, t), (v, torch.ones_like(t)))
    want = v + (r - t)[:, None, None] * slope - u
    errors = []
    for share in (1e-2, 1e-3, 1e-4):
        target = split_target(student, z, t, r, torch.full_like(t, share))
        errors.append(float(((target - u) / share - want).norm() / want.norm()))
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.05)
    assert errors[2] < 1e-3


def test_three_evaluations_of_which_one_has_a_gradient():
    flow, student = Linear(-1.2, 0.7), Scale(torch.float64)
    loss, _ = SplitMeanFlow(Teacher(flow), generator=seeded())(student, batch())
    assert len(student.inputs) == 3
    assert len(flow.asked) == 1
    (_, t, s, _), (z_s, s_again, r, _), (z, t_again, r_again, _) = student.inputs
    assert torch.equal(s, s_again)
    assert torch.equal(t, t_again)
    assert torch.equal(r, r_again)
    assert ((t <= s) & (s <= r)).all()
    first, second = student(z, t, s, None), student(z_s, s, r, None)
    moved = (s - t)[:, None, None] * first + (r - s)[:, None, None] * second
    length = (r - t).masked_fill(t == r, 1.0)[:, None, None]
    target = torch.where((t == r)[:, None, None], flow.velocity(z, t), moved / length).detach()
    (got,) = torch.autograd.grad(loss, student.weight)
    want_loss = (student(z, t, r, None) - target).square().mean()
    (want,) = torch.autograd.grad(want_loss, student.weight)
    torch.testing.assert_close(loss, want_loss)
    torch.testing.assert_close(got, want)


class Shrunk(MeanVelocity):
    """Right at r = t, and `factor` times what it should be elsewhere."""

    factor = 0.0

    def __call__(self, x, t, r, cond):
        u = super().__call__(x, t, r, cond)
        return torch.where((r == t)[:, None, None], u, self.factor * u)


@pytest.mark.parametrize("factor", [0.0, 0.25])
def test_scale_sees_a_collapse(factor):
    """u = 0 over intervals is consistent with itself: the loss is 0, the scale as well."""
    flow = FLOWS["gaussian"]
    healthy = SplitMeanFlow(Teacher(flow), generator=seeded())(flow.student(), batch(40))[1]
    student = Shrunk(flow)
    student.factor = factor
    loss, info = SplitMeanFlow(Teacher(flow), generator=seeded())(student, batch(40))
    torch.testing.assert_close(info["scale"], factor * healthy["scale"])
    if factor == 0:
        assert float(loss) < 1e-24


def test_scale_counts_what_the_loss_counts():
    flow = FLOWS["constant"]
    objective = SplitMeanFlow(Teacher(flow), generator=seeded())
    span = torch.arange(5).expand(40, 5) < 3
    _, info = objective(flow.student(), batch(40, loss_mask=span))
    assert float(info["scale"]) == pytest.approx(1)
    _, info = SplitMeanFlow(Teacher(flow), intervals=Intervals(boundary=1.0))(
        flow.student(), batch()
    )
    assert info["scale"].isnan(), "no interval"
