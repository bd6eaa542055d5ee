"""What only a CUDA device can show of the eager path."""

import pytest
import torch

from imf_kernels import Batch, IntMeanFlow, Teacher, backend, fp8, sampler
from imf_kernels.models.config import FP8_LAYERS
from imf_kernels.ops.fp8_linear import runs_on
from imf_kernels.streaming import Streams
from tests.models.test_cosyvoice2 import small_unet
from tests.models.tools import VARIANTS, conditions, relative_rms, small_model

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact_products():
    """cuDNN takes TF32 for convolutions by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(params=VARIANTS)
def on_cuda(request):
    model = small_model(request.param)
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
    sampler.sample(model, z, cond, "sway", nfe=3, guidance=2.0)
    sampler.sample(model, z, cond, [0.0, 0.3, 1.0], guidance=2.0)


def streamed(family):
    """Models whose heads are of a width that the kernels take."""
    if family == "unet":
        return small_unet(mid_blocks=1, depth=1, head_dim=64).cuda()
    return small_model("cosyvoice3", head_dim=64).cuda()


@pytest.mark.parametrize("family", ["unet", "dit"])
@pytest.mark.parametrize("w", [None, 1.7])
@pytest.mark.parametrize("full", [False, True])
def test_a_stream_never_waits_for_the_device(family, w, full, request):
    model, said = streamed(family), torch.randn(2, 120, 12, device="cuda")
    spks, prompt = torch.randn(12, device="cuda"), torch.zeros(1, 120, 12, device="cuda")
    given = {"mu": said[:1], "spks": spks[None], "guided": w is not None}
    blocks, whole = (
        sampler.sample(
            model,
            said[1:],
            model.prepare(prompt, **given, streaming=masked),
            "cosine",
            nfe=2,
            guidance=w,
        )[0]
        for masked in (True, False)
    )
    streams = Streams(model, "cosine", 2, guidance=w, frames=120)
    request.getfixturevalue("no_sync")
    with streams.open(120, spks=spks, noise=said[1]) as stream:
        for mu in said[0].split(30):
            stream.feed(mu)
            streams.step()
        mels = [stream.drain()]
        stream.finish(full_attention=full)
        mels.append(stream.drain())
    torch.cuda.set_sync_debug_mode("default")
    assert relative_rms(mels[0], blocks[:100]) <= 1e-5
    assert relative_rms(mels[1], (whole if full else blocks)[100:]) <= 1e-5


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


def test_student_equals_the_conditional_teacher_bit_for_bit(on_cuda):
    model, given = on_cuda
    student = model.student().eval()
    x, t = torch.randn(2, 96, 12, device="cuda"), torch.tensor([0.2, 0.6], device="cuda")
    with torch.no_grad():
        expected = model(x, t, t, model.prepare(**given))
        for r in (t, torch.ones_like(t)):
            assert torch.equal(student(x, t, r, student.prepare(**given)), expected)


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


class TestFP8:
    @pytest.fixture(autouse=True)
    def _has_products(self):
        if torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("needs compute capability 8.9")

    def test_the_library_multiplies(self):
        assert runs_on(torch.device("cuda", torch.cuda.current_device()))

    def test_a_solve_never_waits_for_the_device(self, on_cuda, no_sync):
        model, given = on_cuda
        quantised = model.fp8()
        z = torch.randn(2, 96, 12, device="cuda")
        with torch.no_grad():
            cond = quantised.prepare(**given, guided=True)
        sampler.sample(quantised, z, cond, [0.0, 0.3, 1.0], guidance=2.0)

    def test_error_is_that_of_the_reference(self, on_cuda):
        model, given = on_cuda
        z = torch.randn(2, 96, 12, device="cuda")
        found = {}
        for name in ("auto", "reference"):
            with backend(name):
                found[name] = fp8.accuracy(model, model.fp8(), z, given, "sway", nfe=3, bound=0.05)
        assert found["auto"].relative_rms < 1.3 * found["reference"].relative_rms

    def test_layers_are_chosen_by_measurement(self, on_cuda):
        model, _ = on_cuda
        timings = fp8.measure(model, [96, 1000])
        assert len(timings) == 2 * len(FP8_LAYERS)
        assert all(t.bfloat16 > 0 and t.fp8 > 0 for t in timings)
