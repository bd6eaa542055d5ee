import itertools
import math

import pytest
import torch

from imf_kernels import Batch, IntMeanFlow, Teacher
from imf_kernels.distill import distill, schedule
from imf_kernels.objectives import Intervals, RolloutCache
from tests.distill.tools import Affine, pull
from tests.flows import Guided, Linear


def batches():
    x1 = torch.randn(8, 10, 2)
    return itertools.repeat(Batch(x1, torch.full((8,), 10)))


# -- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("nfe", [1, 4])
def test_student_reaches_the_known_optimum(nfe, cached):
    """Which is the mean velocity of the teacher's n Euler steps, not the flow's own."""
    flow = Linear(-1.2, 0.7)
    objective = IntMeanFlow(
        Teacher(flow),
        nfe=nfe,
        source="noise",
        intervals=Intervals(full=1.0),
        cache=RolloutCache(4) if cached else None,
    )
    student = Affine()
    assert distill(student, objective, batches(), 150, lr=0.05, weight_decay=0.0) is student
    slope, offset = flow.euler_mean_velocity(nfe)
    assert student.slope.item() == pytest.approx(slope, abs=2e-3)
    assert student.offset.item() == pytest.approx(offset, abs=2e-3)
    assert len(flow.asked) == nfe * (4 if cached else 150)


def test_guidance_is_distilled_into_the_student():
    flow = Guided(Linear(-1.2, 0.7), Linear(-0.4, 0.1))
    objective = IntMeanFlow(
        Teacher(flow, 2.0), nfe=3, source="noise", intervals=Intervals(full=1.0)
    )
    student = distill(Affine(), objective, batches(), 150, lr=0.1, weight_decay=0.0)
    slope, offset = flow.at(2.0).euler_mean_velocity(3)
    assert student.slope.item() == pytest.approx(slope, abs=2e-3)
    assert student.offset.item() == pytest.approx(offset, abs=2e-3)


# -- the schedule ---------------------------------------------------------------------------------


def test_schedule_closed_form():
    assert [schedule(k, 12, 4) for k in range(4)] == [0.25, 0.5, 0.75, 1.0]
    for k in range(4, 12):
        assert schedule(k, 12, 4) == pytest.approx(math.cos(math.pi * (k - 4) / 16) ** 2)
    assert schedule(0, 10, 0) == 1.0
    assert schedule(5, 10, 0) == pytest.approx(0.5)
    assert schedule(10, 10, 0) == pytest.approx(0.0)
    assert schedule(9, 10, 10) == 1.0


def test_updates_follow_the_schedule():
    path = [1.0]
    student = Affine(slope=1.0)
    distill(
        student,
        pull,
        batches(),
        8,
        lr=0.01,
        warmup=3,
        weight_decay=0.0,
        callback=lambda update, info: path.append(student.slope.item()),
    )
    moves = [a - b for a, b in itertools.pairwise(path)]
    assert moves == pytest.approx([0.01 * schedule(k, 8, 3) for k in range(8)], abs=1e-6)


def test_weight_decay():
    student = Affine(slope=2.0)
    distill(student, pull, batches(), 1, lr=0.01, weight_decay=0.5)
    assert student.slope.item() == pytest.approx(2 * (1 - 0.01 * 0.5) - 0.01, abs=1e-6)


def test_gradients_are_clipped():
    norms = []
    student = Affine()

    def steep(student, batch):
        loss, info = pull(student, batch)
        return 1e6 * loss, info

    def callback(update, info):
        norms.append(math.hypot(float(student.slope.grad), float(student.offset.grad)))

    distill(student, steep, batches(), 2, clip=0.25, callback=callback)
    assert norms == pytest.approx([0.25, 0.25], rel=1e-4)


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_ema_closed_form(decay):
    path = []
    student = Affine(slope=1.0)
    distill(
        student,
        pull,
        batches(),
        6,
        lr=0.1,
        ema_decay=decay,
        callback=lambda update, info: path.append(student.slope.item()),
    )
    mean = path[0]
    for weight in path[1:]:
        mean = decay * mean + (1 - decay) * weight
    assert student.slope.item() == pytest.approx(mean, abs=1e-6)
    assert abs(mean - path[-1]) > 1e-2


def test_ema_keeps_buffers_of_the_last_update():
    student = Affine()
    student.register_buffer("seen", torch.zeros(()))

    def count(student, batch):
        student.seen += 1
        return pull(student, batch)

    distill(student, count, batches(), 3, ema_decay=0.5)
    assert float(student.seen) == 3


# -- the loop -------------------------------------------------------------------------------------


def test_modes_callbacks_and_batches():
    student, calls = Affine().eval(), []
    material = iter([Batch(torch.randn(2, 3, 1), torch.tensor([3, k])) for k in (1, 2, 3)])

    def objective(student, batch):
        assert student.training
        loss, info = pull(student, batch)
        return loss, info | {"length": batch.lengths[1]}

    def callback(update, info):
        calls.append((update, int(info["length"])))

    distill(student, objective, material, 2, callback=callback)
    assert not student.training
    assert calls == [(0, 1), (1, 2)]
    assert int(next(material).lengths[1]) == 3, "no batch is taken in advance"


def test_frozen_parameters_stay():
    student = Affine(slope=1.0, offset=1.0)
    student.offset.requires_grad_(False)
    distill(student, pull, batches(), 3, lr=0.1, ema_decay=0.9)
    assert student.offset.item() == 1.0
    assert student.slope.item() < 1.0


def test_gradients_of_before_do_not_count():
    student = Affine()
    student.slope.grad = torch.tensor([-1e6])
    distill(student, pull, batches(), 1, lr=0.1, weight_decay=0.0)
    assert student.slope.item() == pytest.approx(-0.1, abs=1e-6)


# -- errors ---------------------------------------------------------------------------------------


def test_too_few_batches():
    with pytest.raises(ValueError, match="batches: expected 5 batches, got 3"):
        distill(Affine(), pull, itertools.islice(batches(), 3), 5)


def test_no_trainable_parameters():
    student = Affine()
    student.requires_grad_(False)
    with pytest.raises(ValueError, match="student: expected trainable parameters, got none"):
        distill(student, pull, batches(), 1)


@pytest.mark.parametrize("updates", [0, -1, 2.5, True])
def test_updates_is_a_positive_integer(updates):
    with pytest.raises(ValueError, match=f"updates: expected an integer >= 1, got {updates}"):
        distill(Affine(), pull, batches(), updates)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradient_that_is_not_finite_is_refused(bad):
    """With the weights as they were before the update."""
    student, path = Affine(), []

    def objective(student, batch):
        loss, info = pull(student, batch)
        return loss * (bad if len(path) == 2 else 1.0), info

    def callback(update, info):
        path.append([p.detach().clone() for p in student.parameters()])

    with pytest.raises(FloatingPointError, match="update 2: expected a finite gradient, got norm"):
        distill(student, objective, batches(), 5, lr=0.1, callback=callback)
    assert len(path) == 2
    for now, before in zip(student.parameters(), path[-1], strict=True):
        assert torch.equal(now, before)
