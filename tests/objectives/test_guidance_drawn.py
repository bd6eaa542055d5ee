"""Guidance drawn per row: the teacher integrates with it, the student is told it."""

import math

import pytest
import torch
from torch import nn

from imf_kernels import Batch, IntMeanFlow, Teacher, sampler
from imf_kernels.graphs import GraphTeacher
from imf_kernels.objectives import Intervals, RolloutCache
from tests.flows import FLOWS, GUIDED
from tests.models.tools import small_model
from tests.objectives.tools import batch, real_batch, seeded

RANGE = (1.0, 3.0)


class Exact:
    """The guided flow's mean velocity, at the w that it is told."""

    def __init__(self, flow):
        self.flow, self.told = flow, []

    def prepare(self, lengths, guidance):
        self.told.append(guidance)
        return {"lengths": lengths, "flow": self.flow.at(guidance[:, None, None])}

    def __call__(self, x, t, r, cond):
        return cond["flow"].mean_velocity(x, t, r)


@pytest.mark.parametrize("source", ["data", "noise"])
@pytest.mark.parametrize("guidance", [RANGE, 2.0, lambda rows, *_: torch.linspace(-1, 4, rows)])
def test_teacher_and_student_are_of_the_same_w(source, guidance):
    """What is left of an exact student's loss is the rollout's error, of first order."""
    flow, errors = GUIDED["gaussian"], []
    options = {"source": source, "guidance": guidance, "targets": 2}
    for nfe in (32, 64):
        for teacher in (Teacher(flow), Teacher(flow, 7.0)):  # whose own w does not count
            objective = IntMeanFlow(teacher, nfe=nfe, generator=seeded(), **options)
            loss, _ = objective(Exact(flow), batch())
        errors.append(math.sqrt(loss))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
    assert errors[1] < 0.2


def test_boundary_rows_take_the_velocity_at_their_w():
    flow = GUIDED["gaussian"]
    objective = IntMeanFlow(Teacher(flow), guidance=RANGE, intervals=Intervals(boundary=1.0))
    loss, _ = objective(Exact(flow), batch())
    assert float(loss) < 1e-20


def test_draws_are_uniform_and_the_generators():
    flow = GUIDED["linear"]
    student, again = Exact(flow), Exact(flow)
    for told in (student, again):
        objective = IntMeanFlow(Teacher(flow), nfe=2, guidance=RANGE, generator=seeded())
        objective(told, batch(rows=4000))
    w = student.told[0]
    assert torch.equal(w, again.told[0])
    assert w.dtype == torch.float64
    quantiles = torch.tensor([1.2, 1.5, 2.0, 2.7])
    share = (w[:, None] <= quantiles).float().mean(0)
    torch.testing.assert_close(share, (quantiles - 1) / 2, rtol=0, atol=0.03)
    objective = IntMeanFlow(Teacher(flow), nfe=2, guidance=2.5, generator=seeded())
    objective(student, batch())
    assert (student.told[1] == 2.5).all()


def test_cached_rollouts_keep_their_w():
    flow = GUIDED["gaussian"]

    def made(seed):
        cache = RolloutCache(2, generator=seeded(seed))
        options = {"guidance": RANGE, "cache": cache, "generator": seeded(seed)}
        return IntMeanFlow(Teacher(flow), nfe=64, **options)

    objective, student = made(0), Exact(flow)
    for _ in range(8):
        assert float(objective(student, batch())[0]) < 0.05
    assert len({w.sum().item() for w in student.told}) == 2
    other = made(1)
    other.load_state_dict(objective.state_dict())
    assert float(objective(student, batch())[0]) == float(other(student, batch())[0])


class Told(nn.Module):
    """A student of one channel that can learn one for every w."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = (nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
        self.net = nn.Sequential(*layers)

    def prepare(self, lengths, guidance):
        return {"lengths": lengths, "guidance": guidance}

    def forward(self, x, t, r, cond):
        told = torch.stack([t, r, cond["guidance"]], dim=-1)[:, None].expand(*x.shape[:2], 3)
        return self.net(torch.cat([x, told], dim=-1))


def test_one_student_learns_a_range_of_guidance():
    flow, student, updates = GUIDED["gaussian"], Told(), 300
    options = {"guidance": RANGE, "intervals": Intervals(full=0.5)}
    objective = IntMeanFlow(Teacher(flow), nfe=8, generator=seeded(), **options)
    optimizer = torch.optim.Adam(student.parameters(), fused=True)
    generator, lengths = seeded(1), torch.full((256,), 4)
    for k in range(updates):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * k / updates)) / 2
        x1 = 1.5 + 0.4 * torch.randn(256, 4, 1, generator=generator)
        loss, _ = objective(student, Batch(x1, lengths))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise, lengths = torch.randn(1, 500, 1, generator=seeded(5)), torch.tensor([500])
    ends = []
    for w in (1.0, 1.7, 2.4, 3.0):
        cond = student.prepare(lengths, torch.tensor([w]))
        end = sampler.sample(student, noise, cond, "uniform", nfe=1)
        want = sampler.sample(flow.at(w), noise, cond, "uniform", nfe=8)
        assert float((end - want).square().mean().sqrt()) < 0.2, w
        ends.append(float(end.mean()))
    assert ends[-1] - ends[0] == pytest.approx(2, abs=0.15)  # the flow's own means


def test_real_models():
    teacher = small_model("cosyvoice3", depth=1)
    student = teacher.student(guidance=True)
    objective = IntMeanFlow(Teacher(teacher), nfe=2, guidance=RANGE, generator=seeded())
    loss, _ = objective(student, real_batch(student))
    loss.backward()
    assert student.guidance_embed.mlp[2].weight.grad.abs().max() > 0
    graphs = GraphTeacher(teacher, 2.0, [(2, 8)])
    objective = IntMeanFlow(graphs, nfe=2, guidance=RANGE, generator=seeded())
    torch.testing.assert_close(objective(student, real_batch(student))[0], loss)
    assert graphs.stats().eager == 1
    objective = IntMeanFlow(GraphTeacher(teacher, None, [(2, 8)]), nfe=2, guidance=RANGE)
    with pytest.raises(ValueError, match="guidance: expected None or 1, as at construction"):
        objective(student, real_batch(student))


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        ((1.0,), r"guidance: expected \(least, greatest\), got \(1.0,\)"),
        ((3.0, 1.0), "guidance: expected least <= greatest"),
        ((1.0, math.inf), "guidance: expected a finite number, got inf"),
        ("3", "guidance: expected a finite number, got '3'"),
    ],
)
def test_ranges_that_are_none(guidance, message):
    with pytest.raises(ValueError, match=message):
        IntMeanFlow(Teacher(FLOWS["linear"]), guidance=guidance)


def test_draws_of_another_shape():
    objective = IntMeanFlow(Teacher(GUIDED["linear"]), guidance=lambda *_: torch.ones(3))
    with pytest.raises(ValueError, match=r"guidance: expected shape \(6,\), got \(3,\)"):
        objective(Exact(GUIDED["linear"]), batch())
