import math

import pytest
import torch
from torch import nn

import imf_kernels
from imf_kernels import Batch, MeanFlow, Teacher
from imf_kernels.objectives import Intervals, LogitNormal, total_derivative
from imf_kernels.objectives.students import Prepared
from tests.flows import FLOWS, GUIDED
from tests.models.tools import small_model
from tests.objectives.tools import Scale, Wrapped, batch, real_batch, real_student, seeded

STRICT = Intervals(min_length=0.05)


@pytest.mark.parametrize(
    ("name", "w"), [*((name, None) for name in FLOWS), *((name, 2.0) for name in GUIDED)]
)
def test_exact_student_has_no_loss(name, w):
    flow = FLOWS[name] if w is None else GUIDED[name]
    student = (flow if w is None else flow.at(w)).student()
    objective = MeanFlow(Teacher(flow, w), intervals=STRICT, adaptive=None, generator=seeded())
    loss, info = objective(student, batch(40))
    assert float(loss) < 1e-24
    assert (info["interval"] > 0).all()
    other, _ = objective(Scale(torch.float64), batch(40))
    assert other.item() > 1e-3


class Fixed:
    """One interval for all rows."""

    def draw(self, rows, generator=None, device=None):
        return torch.full((rows,), 0.4), torch.full((rows,), 0.9)


@pytest.mark.parametrize(("one_sided", "order"), [(False, 2), (True, 1)])
def test_differences_tend_to_the_derivative(one_sided, order):
    flow, errors = FLOWS["gaussian"], []
    for step in (0.02, 0.01, 0.005):
        objective = MeanFlow(
            Teacher(flow),
            intervals=Fixed(),
            derivative="difference",
            step=step,
            one_sided=one_sided,
            adaptive=None,
            generator=seeded(),
        )
        errors.append(math.sqrt(objective(flow.student(), batch(40))[0]))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2**order, rel=0.1)


def widened(value):
    real = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if real else value


REAL = ["f5_v0", "f5_v1", "cosyvoice3", "unet"]


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("option", ["padded", "packed", "streaming"])
def test_derivative_of_real_models(name, option):
    student = real_student(name)
    material = real_batch(student, **({} if option == "padded" else {option: True}))
    z, v = (torch.randn(material.x1.shape, generator=seeded(i)) for i in (1, 2))
    t, r = torch.tensor([0.3, 0.5]), torch.tensor([0.9, 0.5])
    got = total_derivative.jvp(student, material, z, t, r, v)
    assert not got.requires_grad
    with imf_kernels.backend("reference"):
        exact = student.double()
        doubled = Batch(
            material.x1.double(),
            material.lengths,
            {name: widened(value) for name, value in material.conditions.items()},
        )
        prepared = Prepared(exact, doubled)

        def at(h):  # times of float32 embeddings: steps that they represent
            time = (t.double() + h).float()
            step = (time.double() - t.double())[:, None, None]
            return prepared(z.double() + step * v.double(), time, r), step

        with torch.no_grad():
            (after, up), (before, down) = at(2**-13), at(-(2**-13))
        want = (after - before) / (up - down)
    assert float((got - want).norm() / want.norm()) < 5e-3
    assert got[1, 4:].abs().max() == 0, "beyond the row"


@pytest.mark.parametrize("name", REAL)
def test_both_derivatives_agree_on_real_models(name):
    student = real_student(name)
    losses, grads = {}, {}
    for derivative in ("jvp", "difference"):
        objective = MeanFlow(
            derivative=derivative, intervals=STRICT, adaptive=None, generator=seeded(3)
        )
        student.zero_grad()
        loss, _ = objective(student, real_batch(student))
        loss.backward()
        losses[derivative] = loss.item()
        grads[derivative] = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert losses["jvp"] == pytest.approx(losses["difference"], rel=5e-3)
    error = (grads["jvp"] - grads["difference"]).norm() / grads["jvp"].norm()
    assert float(error) < 5e-3
    assert grads["jvp"].abs().max() > 0


def test_data_is_the_velocity_without_a_teacher():
    student = Scale(torch.float64)
    objective = MeanFlow(intervals=Intervals(boundary=1.0), adaptive=None, generator=seeded())
    material = batch(400)
    loss, _ = objective(student, material)
    z, t, _, _ = student.inputs[-1]
    noise = (z - t[:, None, None] * material.x1) / (1 - t)[:, None, None]
    error = student.weight[0] * z + student.weight[1] - (material.x1 - noise)
    torch.testing.assert_close(loss, error.square().mean())


def test_adaptive_weights():
    options = {"intervals": STRICT}
    plain, info = MeanFlow(adaptive=None, generator=seeded(), **options)(
        Scale(torch.float64), batch()
    )
    errors = info["row_error"]
    torch.testing.assert_close(plain.detach(), errors.mean())
    student = Scale(torch.float64)
    weighted, info = MeanFlow(adaptive=0.5, generator=seeded(), **options)(student, batch())
    torch.testing.assert_close(info["row_error"], errors)
    torch.testing.assert_close(weighted.detach(), (errors / (errors + 0.5)).mean())


def test_logit_normal():
    t, r = LogitNormal(mean=0.4, std=1.0).draw(100_000, seeded())
    assert t.dtype == torch.float32
    assert ((t >= 0) & (t <= r) & (r <= 1)).all()
    assert float((t == r).float().mean()) == pytest.approx(0.75, abs=0.01)
    t, r = LogitNormal(boundary=0.0).draw(100_000, seeded())
    both = torch.cat([t, r]).logit()
    assert float(both.mean()) == pytest.approx(0.4, abs=0.01)
    assert float(both.std()) == pytest.approx(1.0, abs=0.01)
    assert float((r.logit() - t.logit()).mean()) == pytest.approx(2 / math.sqrt(math.pi), abs=0.01)
    t, r = LogitNormal(boundary=1.0).draw(10)
    assert torch.equal(t, r)


# -- what forward-mode AD cannot do ---------------------------------------------------------------


@torch.library.custom_op("imf_kernels_tests::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


square.register_fake(torch.empty_like)
square.register_autograd(
    lambda ctx, grad: 2 * grad * ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


class Foreign(Scale):
    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, x, t, r, cond):
        return super().forward(self.op(x), t, r, cond)


def attend(x):
    return nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


DROPPED = {
    "custom op": square,
    "detach": lambda x: x + x.detach(),
    "dropout": lambda x: nn.functional.dropout(x),
}


@pytest.mark.parametrize("name", DROPPED)
def test_a_dropped_tangent_is_refused(name):
    with pytest.raises(RuntimeError, match="an op drops tangents"):
        MeanFlow()(Foreign(DROPPED[name]), batch(dtype=torch.float32))


def test_a_difference_needs_no_forward_mode():
    losses = [
        MeanFlow(derivative=derivative, intervals=STRICT, generator=seeded())(
            Foreign(op), batch(dtype=torch.float32)
        )[0]
        for derivative, op in [("difference", square), ("jvp", torch.square)]
    ]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)


def test_attention_of_pytorch_has_a_derivative():
    """Its default kernel on the CPU has none."""
    loss, _ = MeanFlow()(Foreign(attend), batch(dtype=torch.float32))
    assert loss.isfinite()


class Offset(Wrapped):
    """A wrapper that is no mere wrapper."""

    def forward(self, x, t, r, cond):
        return super().forward(x, t, r, cond) + t[:, None, None]


def test_wrappers():
    inner = Scale(torch.float64)
    want, _ = MeanFlow(generator=seeded())(inner, batch())
    wrapper = Wrapped(Scale(torch.float64))
    objective = MeanFlow(generator=seeded())
    loss, _ = objective(wrapper, batch())
    assert torch.equal(loss, want)
    before = wrapper.calls
    objective(wrapper, batch())
    assert wrapper.calls == before + 1, "the one evaluation with gradient"
    with pytest.raises(RuntimeError, match="agrees with a difference"):
        MeanFlow()(Offset(Scale(torch.float64)), batch())


def test_a_wrapper_without_weights_is_refused():
    class FullyShardedDataParallel(Wrapped):
        pass

    with pytest.raises(TypeError, match="student: expected one under DistributedDataParallel"):
        MeanFlow()(FullyShardedDataParallel(Scale()), batch(dtype=torch.float32))


@pytest.mark.parametrize("derivative", ["jvp", "difference"])
def test_half_precision_is_refused(derivative):
    student = real_student("cosyvoice3")
    material = real_batch(student)
    for model in (student.bfloat16(), small_model("cosyvoice3").fp8()):
        with pytest.raises(TypeError, match=r"expected float32 weights.*bfloat16"):
            MeanFlow(derivative=derivative)(model, material)


@pytest.mark.parametrize("derivative", ["jvp", "difference"])
def test_autocast_leaves_the_target_exact(derivative):
    student, kept = real_student("unet"), []
    material = real_batch(student)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            z, v = (torch.randn(material.x1.shape, generator=seeded(i)) for i in (1, 2))
            t, r = torch.tensor([0.3, 0.5]), torch.tensor([0.9, 0.6])
            kept.append(getattr(total_derivative, derivative)(student, material, z, t, r, v))
            loss, _ = MeanFlow(derivative=derivative, intervals=STRICT)(student, material)
            loss.backward()
    assert torch.equal(*kept)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="one_sided"):
        MeanFlow(derivative="difference", one_sided=True)(student, material)


def test_checkpointed_activations():
    student = real_student("f5_v1")
    material = real_batch(student)
    losses = []
    for student.checkpoint_activations in (False, True):
        student.zero_grad()
        loss, _ = MeanFlow(intervals=STRICT, generator=seeded())(student, material)
        loss.backward()
        losses.append((loss.detach(), student.proj_out.weight.grad))
    torch.testing.assert_close(*losses)
    reentrant = Foreign(
        lambda x: torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=True)
    )
    with pytest.raises(NotImplementedError, match="jvp"):
        MeanFlow()(reentrant, batch(dtype=torch.float32))  # fmt: skip


def test_precision_switches_are_restored():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        seen = []

        def look(x):
            seen.append(matmul.fp32_precision)
            return x

        MeanFlow(derivative="difference")(Foreign(look), batch(dtype=torch.float32))
        assert seen == ["ieee", "ieee", "tf32"]
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
