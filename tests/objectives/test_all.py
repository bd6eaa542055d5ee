"""What holds of every objective."""

import math

import pytest
import torch
from torch import multiprocessing, nn

from imf_kernels import Batch, DSFlow, Teacher, sampler
from imf_kernels.objectives import TeacherRollout
from tests.flows import FLOWS, GUIDED, Linear
from tests.models.tools import small_model
from tests.objectives import ranks
from tests.objectives.tools import Scale, Small, Wrapped, batch, real_batch, real_student, seeded

EVERY = pytest.mark.parametrize("name", ranks.objectives(Teacher(GUIDED["linear"], 2.0), 0))


def objective(name, teacher=None, seed=0, **options):
    teacher = teacher or Teacher(FLOWS["gaussian"])
    made = ranks.objectives(teacher, seed)[name]
    for option, value in options.items():
        assert hasattr(made, option)
        setattr(made, option, value)
    return made


@EVERY
def test_reproducible_with_a_generator(name):
    def run(seed):
        made = objective(name, seed=seed)
        losses = [made(Scale(torch.float64), batch())[0].detach() for _ in range(2)]
        return torch.stack(losses)

    before = torch.get_rng_state()
    first = run(1)
    assert torch.equal(torch.get_rng_state(), before), "drew from the global generator"
    assert torch.equal(run(1), first)
    assert not torch.equal(run(2), first)
    assert first[0] != first[1]


class TeacherModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(-0.8))

    def prepare(self, lengths, shift, guided=False):
        return {"lengths": lengths, "shift": shift * self.slope}

    def forward(self, x, t, r, cond):
        return self.slope * x + cond["shift"][:, None, None]


@EVERY
def test_gradients_reach_the_student_alone(name):
    teacher, student = Teacher(TeacherModule()), Scale()
    material = batch(dtype=torch.float32, conditions={"shift": torch.arange(6.0).requires_grad_()})
    material.x1.requires_grad_()
    loss, info = objective(name, teacher)(student, material)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert not any(value.requires_grad for value in info.values())
    torch.testing.assert_close(info["loss"], loss.detach())
    loss.backward()
    assert student.weight.grad.abs().min() > 0
    assert teacher.model.slope.grad is None
    assert not teacher.model.training
    assert material.conditions["shift"].grad is None
    assert material.x1.grad is None


@EVERY
def test_values_beyond_the_lengths_do_not_matter(name):
    clean = batch(lengths=[5, 4, 3, 2, 1, 5])
    dirty = Batch(torch.where(clean.valid()[:, :, None], clean.x1, 1e6), clean.lengths)
    losses = [objective(name)(Scale(torch.float64), material)[0] for material in (clean, dirty)]
    torch.testing.assert_close(*losses)


@EVERY
def test_region(name):
    """Frames of the span alone, or all valid ones: nothing else moves the loss."""
    span = torch.zeros(6, 5, dtype=torch.bool)
    span[:, 1:3] = True

    def loss(region, changed):
        clean = batch(lengths=[5, 4, 3, 4, 5, 3])
        x1 = torch.where(changed[:, :, None], clean.x1 + 1, clean.x1)
        material = Batch(x1, clean.lengths, loss_mask=span)
        made = objective(name, Teacher(Linear(-1.2, 0.7)), region=region)
        if isinstance(made, DSFlow):  # which does not look at x1
            rollout = made.rollout(material)
            moved = rollout.displacements + changed[:, :, None].double()
            rollout = TeacherRollout(*rollout[:3], rollout.states + 0, moved, None)
            rollout.states[-1] += changed[:, :, None]
            return float(made.loss(Scale(torch.float64), rollout, 2)[0].detach())
        return float(made(Scale(torch.float64), material)[0].detach())

    nothing = torch.zeros_like(span)
    valid = batch(lengths=[5, 4, 3, 4, 5, 3]).valid()
    assert loss("span", ~span) == loss("span", nothing)
    assert loss("span", span) != loss("span", nothing)
    assert loss("all", ~valid) == loss("all", nothing)
    assert loss("all", valid & ~span) != loss("all", nothing)
    assert loss("all", nothing) != loss("span", nothing)


@EVERY
def test_wrapped_and_compiled_students(name):
    losses = []
    for wrap in (lambda s: s, Wrapped, lambda s: torch.compile(s, backend="eager")):
        student = Small()
        material = batch(channels=1, dtype=torch.float32)
        loss, _ = objective(name)(wrap(student), material)
        loss.backward()
        losses.append((loss.detach(), [p.grad for p in student.parameters()]))
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0])


@pytest.mark.parametrize("name", ["IntMeanFlow", "DSFlow"])
def test_a_real_model_compiled(name):
    """Forward and backward as a compiler gets them, our ops inside."""
    teacher, losses = Teacher(real_student("f5_v1", depth=1), 2.0), []
    for backend in (None, "aot_eager"):
        student = real_student("f5_v1", depth=1)
        called = student if backend is None else torch.compile(student, backend=backend)
        loss, _ = objective(name, teacher)(called, real_batch(student))
        loss.backward()
        grads = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        losses.append((loss.detach(), grads))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-6)


@EVERY
def test_autocast(name):
    student = real_student("cosyvoice3")
    teacher, material, losses = Teacher(real_student("cosyvoice3"), 2.0), real_batch(student), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(objective(name, teacher)(student, material)[0])
    losses[1].backward()
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(*losses, rtol=0.03, atol=0)
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


@EVERY
def test_teacher_of_another_size_and_family(name):
    teacher, student = Teacher(real_student("unet"), 2.0), real_student("cosyvoice3", dim=16)
    material = real_batch(student)
    loss, _ = objective(name, teacher)(student, material)
    loss.backward()
    assert student.proj_out.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["SplitMeanFlow", "DSFlow", "MeanFlow"])
def test_a_student_that_is_told_its_guidance_is_refused(name):
    student = small_model("f5_v1", depth=1).student(guidance=True)
    for wrap in (lambda s: s, Wrapped):
        with pytest.raises(ValueError, match=f"student: expected .* {name} does not, got one of"):
            objective(name)(wrap(student), batch())


def test_two_processes_train_as_one(tmp_path):
    """Under DistributedDataParallel and fully_shard."""
    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    multiprocessing.spawn(ranks.work, (rendezvous,), nprocs=2)


# -- training -------------------------------------------------------------------------------------


class Mixture:
    """The marginal flow from N(0, 1) to even parts of N(-1, .3^2) and N(1, .3^2)."""

    def prepare(self, lengths, guided=False):
        return {"lengths": lengths}

    def __call__(self, x, t, r, cond):
        t = t[:, None, None]
        variance = (1 - t) ** 2 + (0.3 * t) ** 2
        slope = (0.09 * t - (1 - t)) / variance
        right = torch.sigmoid(2 * t * x / variance)
        return slope * x + (1 - slope * t) * (2 * right - 1)


@EVERY
def test_trains_to_the_mean_velocity_of_a_mixture(name):
    """One step of the student leads where the fine solve ends; one of the teacher, to 0."""
    made, student, generator = objective(name, Teacher(Mixture())), Small(), seeded(1)
    made.nfe = 8
    updates, lengths = 250, torch.full((64,), 16)
    optimizer = torch.optim.Adam(student.parameters(), fused=True)
    for k in range(updates):
        side = torch.randint(0, 2, (64, 16, 1), generator=generator) * 2 - 1
        x1 = side + 0.3 * torch.randn(64, 16, 1, generator=generator)
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 + math.cos(math.pi * k / updates)) / 2
        loss, _ = made(student, Batch(x1, lengths))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise, cond = torch.randn(1, 2000, 1, generator=seeded(5)), {"lengths": torch.tensor([2000])}
    fine = sampler.sample(Mixture(), noise, cond, "uniform", nfe=100)

    def error(model, nfe):
        x = sampler.sample(model, noise, cond, "uniform", nfe=nfe)
        return float((x - fine).square().mean().sqrt())

    assert error(Mixture(), 1) > 0.9
    assert error(Mixture(), 2) > 0.4
    assert error(student, 1) < 0.35
    assert error(student, 2) < 0.25
