import math

import pytest
import torch

from imf_kernels import DSFlow, Teacher, sampler
from imf_kernels.objectives import TeacherRollout
from tests.flows import FLOWS, GUIDED, Linear
from tests.objectives.tools import Scale, batch, seeded


@pytest.mark.parametrize("count", [1, 2, 4])
def test_straight_paths_are_exact(count):
    flow = FLOWS["constant"]
    objective = DSFlow(Teacher(flow), nfe=8, generator=seeded())
    loss, info = objective.loss(flow.student(), objective.rollout(batch()), count)
    assert float(loss) < 1e-24
    assert float(info["endpoint"]) < 1e-24
    assert float(info["velocity"]) < 1e-24


@pytest.mark.parametrize("name", ["linear", "gaussian"])
@pytest.mark.parametrize("w", [None, 2.0])
def test_endpoint_is_the_teachers_to_first_order_in_its_steps(name, w):
    flow = FLOWS[name] if w is None else GUIDED[name]
    student = (flow if w is None else flow.at(w)).student()
    for count in (1, 2, 4):
        errors = []
        for nfe in (32, 64, 128):
            objective = DSFlow(Teacher(flow, w), nfe=nfe, generator=seeded())
            _, info = objective.loss(student, objective.rollout(batch()), count)
            errors.append(math.sqrt(info["endpoint"]))
        assert errors[0] / errors[1] == pytest.approx(2, rel=0.08)
        assert errors[1] / errors[2] == pytest.approx(2, rel=0.08)


def exact_rollout(flow, parts, rows=64):
    """What an infinitely fine teacher would leave."""
    material = batch(rows)
    z = torch.randn(material.x1.shape, generator=seeded(), dtype=torch.float64)
    at = torch.linspace(0, 1, parts + 1, dtype=torch.float64)[:, None].expand(-1, rows)
    states = torch.stack([flow.carry(z, at[0], time) for time in at])
    return TeacherRollout(material, at, at, states, states - z, None)


@pytest.mark.parametrize("name", ["linear", "gaussian"])
def test_velocity_is_the_midpoint_rules(name):
    """Exact to second order in the length of the parts; the endpoint exactly."""
    flow, errors = FLOWS[name], []
    for count in (4, 8, 16):
        objective = DSFlow(Teacher(flow), counts=(count,), generator=seeded())
        _, info = objective.loss(flow.student(), exact_rollout(flow, count), count)
        errors.append(math.sqrt(info["velocity"]))
        assert float(info["endpoint"]) < 1e-24
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize("spacing", ["uniform", "sway"])
def test_endpoint_is_what_sampling_gives(spacing):
    student, count = Scale(torch.float64), 2
    objective = DSFlow(
        Teacher(FLOWS["gaussian"]), nfe=8, spacing=spacing, endpoint=1.0, generator=seeded()
    )
    rollout = objective.rollout(batch())
    loss, info = objective.loss(student, rollout, count)
    asked = student.inputs[:count]
    assert [float(t[0]) for _, t, _, _ in asked] == [float(t[0]) for t in rollout.times[:-1:2]]
    grid = rollout.times[::2, 0].float()
    sample = sampler.sample(
        student, rollout.states[0], student.prepare(batch().lengths), grid, grad=True
    )
    want = (sample - rollout.states[-1]).square().mean()
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(info["endpoint"], loss.detach())
    got = torch.autograd.grad(loss, student.weight)[0]
    torch.testing.assert_close(got, torch.autograd.grad(want, student.weight)[0], rtol=1e-5, atol=0)


def test_midpoints_lie_between_the_teachers_states():
    student = Scale(torch.float64)
    objective = DSFlow(Teacher(FLOWS["gaussian"]), nfe=8, endpoint=0.0, generator=seeded())
    rollout = objective.rollout(batch(400))
    loss, info = objective.loss(student, rollout, 4)
    assert len(rollout.states) == 5, "what lies between parts is not held"
    middle, t, r, _ = student.inputs[-1]
    assert torch.equal(t, r)
    part = (t * 4).long()
    torch.testing.assert_close(t, (part.double() + 0.5) / 4)
    assert torch.bincount(part).min() > 70
    rows = torch.arange(400)
    before, after = rollout.states[part, rows], rollout.states[part + 1, rows]
    torch.testing.assert_close(middle, (before + after) / 2)
    want = (student.weight[0] * middle + student.weight[1] - 4 * (after - before)).square().mean()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(info["velocity"], loss.detach())


def test_counts_take_turns_and_are_paid_for():
    flow = Linear(-1.2, 0.7)
    objective = DSFlow(Teacher(flow), nfe=8, p_uncond=0.0, generator=seeded())
    evaluations = []
    for _ in range(6):
        student = Scale(torch.float64)
        objective(student, batch())
        evaluations.append(len(student.inputs))
    assert evaluations == [2, 3, 5] * 2
    assert len(flow.asked) == 6 * 8
    assert objective.calls == 6


class Unconditional(Scale):
    """Its unconditional branch has weights of its own."""

    def prepare(self, lengths, guided=False):
        return {"lengths": lengths.repeat(1 + guided)}

    def forward(self, x, t, r, cond):
        u = super().forward(x, t, r, cond)
        return torch.cat([u, 3 * u]) if len(cond["lengths"]) > len(x) else u


def test_weak_guidance():
    flow = GUIDED["gaussian"]
    objective = DSFlow(Teacher(flow, 2.0), nfe=4, generator=seeded())
    rollout = objective.rollout(batch())
    student = Unconditional(torch.float64)
    state = objective.generator.get_state()
    plain, _ = objective.loss(student, rollout, 2)
    objective.generator.set_state(state)
    loss, info = objective.loss(student, rollout, 2, uncond=True)
    middle, t, _, _ = student.inputs[-1]
    u = student.weight[0] * middle + student.weight[1]
    want = (3 * u - flow.unconditional.velocity(middle, t)).square().mean()
    torch.testing.assert_close(loss, plain + 0.01 * want)
    torch.testing.assert_close(info["uncond"], want.detach())


def test_share_of_unconditional_calls():
    objective = DSFlow(Teacher(GUIDED["linear"], 2.0), nfe=4, p_uncond=0.1, generator=seeded())
    seen = ["uncond" in objective(Unconditional(torch.float64), batch())[1] for _ in range(40)]
    assert seen == ([False] * 9 + [True]) * 4
    unguided = DSFlow(Teacher(FLOWS["linear"]), nfe=4, p_uncond=1.0, generator=seeded())
    assert "uncond" not in unguided(Scale(torch.float64), batch())[1]


class StepAware(Unconditional):
    def prepare(self, lengths, nfe, guided=False):
        self.told = nfe
        return super().prepare(lengths, guided)


def test_a_student_may_be_told_its_step_count():
    teacher = Teacher(GUIDED["gaussian"], 2.0)
    objective = DSFlow(teacher, nfe=4, steps="nfe", p_uncond=0.5, generator=seeded())
    student, told = StepAware(torch.float64), []
    for _ in range(6):
        objective(student, batch())
        told.append(student.told)
    assert told == [1, 2, 4] * 2
