import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imf_kernels import dispatch
from imf_kernels.ops.guided_euler_step import _op, guided_euler_step, reference
from tests.ops.tools import DEVICE, HALF, assert_compiles_once, backend, kernel_backends

FORMS = ["unguided", "number", "tensor"]


def inputs(rows, frames, channels, form, *, substeps=1, dtype=torch.float32):
    guided = 1 if form == "unguided" else 2
    velocity = torch.randn(substeps, guided * rows, frames, channels, device=DEVICE).to(dtype)
    return {
        "x": torch.randn(rows, frames, channels, device=DEVICE),
        "velocity": velocity,
        "dt": torch.rand(substeps, rows, device=DEVICE),
        "guidance": {
            "unguided": None,
            "number": 2.3,
            "tensor": torch.linspace(0.5, 3, rows, device=DEVICE),
        }[form],
    }


@pytest.mark.parametrize("name", kernel_backends(cpp=True))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 17, 80), (3, 63, 100), (2, 1000, 80)])
def test_kernels_equal_the_reference(name, form, shape):
    args = inputs(*shape, form)
    lengths = torch.randint(1, shape[1] + 1, (shape[0],), device=DEVICE)
    displacement = torch.randn(shape, device=DEVICE)
    expected = reference(**args, lengths=lengths, displacement=displacement)
    with backend(name):
        step = guided_euler_step(**args, lengths=lengths, displacement=displacement)
    rtol = 0 if name == "cpp" else 1e-6  # the C++ kernel promises the same bits
    torch.testing.assert_close(step.x, expected.x, rtol=rtol, atol=rtol)
    torch.testing.assert_close(step.displacement, expected.displacement, rtol=rtol, atol=rtol)
    assert step.model_input is step.x


@pytest.mark.parametrize("name", kernel_backends(cpp=True))
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("form", FORMS)
def test_held_substeps_and_model_dtypes(name, dtype, form):
    args = inputs(2, 31, 20, form, substeps=3, dtype=dtype)
    model_dtype = torch.bfloat16 if dtype == torch.float32 else dtype
    expected = reference(**args, model_dtype=model_dtype)
    with backend(name):
        step = guided_euler_step(**args, model_dtype=model_dtype)
    torch.testing.assert_close(step.x, expected.x, rtol=1e-6, atol=2e-6)
    assert step.displacement is None
    assert step.model_input.dtype == model_dtype
    # one unit in the last place: the interpreter truncates to bfloat16, a GPU rounds
    ulp = torch.finfo(model_dtype).eps
    torch.testing.assert_close(step.model_input, step.x.to(model_dtype), rtol=ulp, atol=1e-6)


@pytest.mark.parametrize("name", ["reference", *kernel_backends(cpp=True)])
def test_held_substeps_equal_steps_one_by_one(name):
    args = inputs(2, 9, 4, "tensor", substeps=4)
    with backend(name):
        whole = guided_euler_step(**args).x
        x = args["x"]
        for velocity, dt in zip(args["velocity"], args["dt"], strict=True):
            x = guided_euler_step(x, velocity, dt, args["guidance"]).x
    torch.testing.assert_close(whole, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["reference", *kernel_backends(cpp=True)])
def test_nothing_moves_beyond_the_lengths_whatever_lies_there(name):
    args = inputs(3, 20, 7, "tensor")
    lengths = torch.tensor([20, 1, 13], device=DEVICE)
    for row, length in enumerate(lengths.tolist()):
        args["velocity"][:, row, length:] = torch.nan
        args["velocity"][:, 3 + row, length:] = torch.inf
    displacement = torch.randn(3, 20, 7, device=DEVICE)
    with backend(name):
        step = guided_euler_step(**args, lengths=lengths, displacement=displacement)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(step.x[row, length:], args["x"][row, length:])
        assert torch.equal(step.displacement[row, length:], displacement[row, length:])
    assert torch.isfinite(step.x).all()
    assert not torch.equal(step.x[0], args["x"][0])


@pytest.mark.parametrize("name", ["reference", *kernel_backends(cpp=True)])
def test_strided_views(name):
    """Channels-first mels, sliced batches and transposed dt are read as what they are."""
    args = inputs(2, 12, 10, "number")
    strided = {
        "x": args["x"].transpose(1, 2).contiguous().transpose(1, 2),
        "velocity": torch.randn(1, 8, 12, 10, device=DEVICE)[:, ::2].copy_(args["velocity"]),
        "dt": args["dt"].t().contiguous().t(),
        "guidance": args["guidance"],
    }
    with backend(name):
        x = guided_euler_step(**strided).x
    torch.testing.assert_close(x, reference(**args).x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["reference", *kernel_backends(cpp=True)])
@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4)])
def test_empty(name, shape):
    args = inputs(*shape, "tensor")
    with backend(name):
        step = guided_euler_step(**args, displacement=torch.zeros(shape, device=DEVICE))
    assert step.x.shape == step.displacement.shape == shape


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
def test_displacement_keeps_the_digits_that_the_state_loses(name):
    velocity = torch.randn(1, 8, 16, device=DEVICE)
    x = 100 + torch.rand(1, 8, 16, device=DEVICE)
    displacement, state = torch.zeros_like(x), x
    dt = torch.full((1,), 1e-5, device=DEVICE)
    with backend(name):
        for _ in range(10):
            state, displacement, _ = guided_euler_step(
                state, velocity, dt, displacement=displacement
            )
    exact = velocity.double() * 1e-4
    relative = (displacement - exact).abs().max() / exact.abs().max()
    assert relative < 1e-6
    assert ((state - x) - exact).abs().max() / exact.abs().max() > 1e-3


@given(w=st.floats(-3, 5), rows=st.integers(1, 3), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_guidance_algebra(w, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    velocity = torch.randn(2 * rows, 4, 3, generator=generator)
    x = torch.randn(rows, 4, 3, generator=generator)
    dt = torch.rand(rows, generator=generator)
    number = guided_euler_step(x, velocity, dt, w)
    tensor = guided_euler_step(x, velocity, dt, torch.full((rows,), w))
    torch.testing.assert_close(number.x, tensor.x)
    alone = guided_euler_step(x, velocity[:rows], dt)
    torch.testing.assert_close(guided_euler_step(x, velocity, dt, 1.0).x, alone.x)
    order = torch.randperm(rows, generator=generator)
    shuffled = guided_euler_step(x[order], velocity[torch.cat([order, order + rows])], dt[order], w)
    torch.testing.assert_close(shuffled.x, number.x[order])


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(name, form):
    args = {
        key: value.double() if isinstance(value, torch.Tensor) else value
        for key, value in inputs(2, 3, 2, form, substeps=2).items()
    }
    lengths = torch.tensor([3, 2], device=DEVICE)
    displacement = torch.randn(2, 3, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def run(x, velocity, displacement):
        step = guided_euler_step(
            x,
            velocity,
            args["dt"],
            args["guidance"],
            lengths=lengths,
            displacement=displacement,
        )
        return step.x, step.displacement

    with backend(name):
        leaves = args["x"].requires_grad_(), args["velocity"].requires_grad_(), displacement
        assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("name", kernel_backends(cpp=True))
def test_gradients_pass_through_the_model_input(name):
    args = inputs(2, 5, 4, "number", dtype=torch.bfloat16)
    grads = []
    for choice in ("reference", name):
        x, velocity = args["x"].clone().requires_grad_(), args["velocity"].clone().requires_grad_()
        with backend(choice):
            step = guided_euler_step(x, velocity, args["dt"], 2.3, model_dtype=torch.bfloat16)
        (step.x.sin().sum() + step.model_input.float().cos().sum()).backward()
        grads.append((x.grad, velocity.grad))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", kernel_backends(cpp=True))
def test_opcheck(name):
    dtypes = [(None, torch.float32), (torch.bfloat16, torch.float32), (None, torch.float64)]
    for form, (model_dtype, dtype) in itertools.product(FORMS, dtypes):
        args = {
            key: value.to(dtype) if isinstance(value, torch.Tensor) else value
            for key, value in inputs(2, 5, 4, form).items()
        }
        guidance = args["guidance"] if form == "tensor" else None
        displacement = torch.zeros(2, 5, 4, device=DEVICE, dtype=dtype)
        x = args["x"].requires_grad_()
        lengths = torch.tensor([5, 3], device=DEVICE)
        op_args = (x, args["velocity"], args["dt"], guidance, 2.3, lengths, displacement)
        with backend(name):
            torch.library.opcheck(_op, (*op_args, model_dtype))


@pytest.mark.parametrize("name", ["reference", *kernel_backends(cpp=True)])
def test_compiles_without_graph_breaks_or_recompiles(name):
    def run(x, velocity, dt, lengths, w):
        return guided_euler_step(x, velocity, dt, w, lengths=lengths).x

    def call(frames, w):
        args = inputs(2, frames, 6, "number")
        lengths = torch.tensor([frames, 2], device=DEVICE)
        return args["x"], args["velocity"][0], args["dt"][0], lengths, w

    with backend(name):
        assert_compiles_once(run, *(call(frames, 2.3) for frames in (7, 12, 33)))
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="eager")
        for w in (2.3, 1.7):
            args = call(9, w)
            torch.testing.assert_close(compiled(*args), run(*args))


@pytest.mark.parametrize("name", kernel_backends(cpp=True))
@pytest.mark.parametrize("argument", ["velocity", "dt", "guidance"])
def test_forward_mode_ad_is_refused_through_every_argument(name, argument):
    args = inputs(1, 3, 2, "tensor")

    def run(value):
        return guided_euler_step(**args | {argument: value}).x

    with backend(name), pytest.raises(RuntimeError, match="forward-mode AD"):
        torch.func.jvp(run, (args[argument],), (torch.ones_like(args[argument]),))


@pytest.mark.parametrize("name", kernel_backends(cpp=True))
def test_a_float64_number_keeps_its_digits(name):
    args = inputs(1, 3, 2, "number")
    args = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    with backend(name):
        got = guided_euler_step(**args | {"guidance": 1 / 3}).x
    torch.testing.assert_close(got, reference(**args | {"guidance": 1 / 3}).x, rtol=1e-14, atol=0)


@pytest.mark.skipif(not dispatch.HAS_EXTENSION, reason="the C++ extension is not built")
@pytest.mark.parametrize(
    ("broken", "argument"),
    [
        ({"x": torch.zeros(2, 3)}, "x"),
        ({"x": torch.zeros(2, 5, 4).double()}, "x"),
        ({"velocity": torch.zeros(1, 3, 5, 4)}, "velocity"),
        ({"dt": torch.zeros(3, 2)}, "dt"),
        ({"guidance": torch.zeros(3)}, "guidance"),
        ({"lengths": torch.zeros(2)}, "lengths"),
    ],
)
def test_the_extension_checks_its_arguments_itself(broken, argument):
    args = {
        "x": torch.zeros(2, 5, 4),
        "velocity": torch.zeros(1, 4, 5, 4),
        "dt": torch.zeros(1, 2),
        "guidance": torch.zeros(2),
        "scale": 1.0,
        "lengths": torch.ones(2, dtype=torch.int64),
        "displacement": None,
        "model_dtype": None,
    }
    op = torch.ops.imf_kernels.guided_euler_step_cpu
    assert op(**args)[0].requires_grad is False
    with pytest.raises(RuntimeError, match=argument):
        op(**args | broken)


@pytest.mark.parametrize("name", kernel_backends(cpp=True))
def test_forward_mode_ad_is_refused_on_kernels_and_right_on_the_reference(name):
    args = inputs(1, 3, 2, "unguided")

    def run(x):
        return guided_euler_step(x, args["velocity"], args["dt"]).x

    tangent = torch.randn_like(args["x"])
    with backend(name), pytest.raises(RuntimeError, match="forward-mode AD"):
        torch.func.jvp(run, (args["x"],), (tangent,))
    with backend("reference"):
        _, out = torch.func.jvp(run, (args["x"],), (tangent,))
    torch.testing.assert_close(out, tangent)
