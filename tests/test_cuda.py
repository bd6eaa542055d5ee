"""What only a CUDA device can show of the eager path."""

import pytest
import torch

from imf_kernels import Batch, IntMeanFlow, Teacher, backend, grids, sampler
from tests.models.tools import conditions, relative_rms, small_model

pytestmark = pytest.mark.gpu


@pytest.fixture
def on_cuda():
    model = small_model("f5_v1")
    given = {name: value.cuda() for name, value in conditions(model, [96, 60]).items()}
    return model.cuda(), given


@pytest.fixture
def no_sync():
    """Any wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_a_solve_never_waits_for_the_device(on_cuda, no_sync):
    model, given = on_cuda
    teacher = Teacher(model, guidance=2.0)
    cond = teacher.prepare(**given)
    z = torch.randn(2, 96, 12, device="cuda")
    t, r = torch.zeros(2, device="cuda"), torch.ones(2, device="cuda")
    teacher.integrate(z, t, r, 4, cond, keep=True)
    grid = grids.sway(3).pin_memory()
    sampler.sample(model, z, cond, grid.to("cuda", non_blocking=True), guidance=2.0)


def test_kernels_solve_as_the_reference_does(on_cuda):
    model, given = on_cuda
    teacher = Teacher(model, guidance=2.0)
    z = torch.randn(2, 96, 12, device="cuda")
    mels = []
    for name in ("reference", "triton"):
        with backend(name):
            cond = teacher.prepare(**given)
            mels.append(sampler.sample(model, z, cond, "sway", nfe=4, guidance=2.0))
    assert relative_rms(mels[1], mels[0]) <= 1e-5


def test_a_training_step_matches_the_reference(on_cuda):
    model, given = on_cuda
    batch = Batch(
        torch.randn(2, 96, 12, device="cuda"),
        given.pop("lengths"),
        given,
    )
    gradients = []
    for name in ("reference", "triton"):
        with backend(name):
            student = model.student()
            generator = torch.Generator("cuda").manual_seed(0)
            objective = IntMeanFlow(Teacher(model, guidance=2.0), nfe=2, generator=generator)
            objective(student, batch)[0].backward()
            gradients.append(student.transformer_blocks[0].attn_norm.linear.weight.grad)
    assert relative_rms(gradients[1], gradients[0]) <= 1e-4
