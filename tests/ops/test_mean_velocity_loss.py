import pytest
import torch

from imf_kernels.ops.mean_velocity_loss import _op, _op_backward, mean_velocity_loss
from tests.ops.tools import (
    DEVICE,
    HALF,
    assert_compiles_once,
    assert_error_rule,
    backend,
    kernel_backends,
    poisoned_memory,
)

SHAPES = [(1, 1, 3), (2, 17, 80), (3, 63, 100), (2, 100, 7)]


def inputs(rows, frames, channels, dtype=torch.float32, boundary=True):
    """A batch in which every second row, from the first, has r = t if there is a boundary."""
    shape = (rows, frames, channels)
    t = torch.rand(rows, device=DEVICE) * 0.5
    r = t + 0.1 + 0.4 * torch.rand(rows, device=DEVICE)
    if boundary:
        r[::2] = t[::2]
    return {
        "prediction": torch.randn(shape, device=DEVICE).to(dtype),
        "displacement": torch.randn(shape, device=DEVICE),
        "t": t,
        "r": r,
        "velocity": torch.randn(shape, device=DEVICE) if boundary else None,
        "mask": torch.rand(rows, frames, device=DEVICE) < 0.7,
        "weights": torch.rand(rows, device=DEVICE) + 0.5,
    }


def plain(prediction, displacement, t, r, velocity, mask, weights):
    """The definition row by row, in the prediction's dtype."""
    total = torch.zeros((), dtype=prediction.dtype, device=DEVICE)
    rows = []
    for b in range(len(t)):
        instant = bool(t[b] == r[b])
        target = velocity[b] if instant else displacement[b] / (r[b] - t[b])
        error = (prediction[b] - target.to(prediction.dtype))[mask[b]]
        total = total + weights[b].to(prediction.dtype) * error.square().sum()
        rows.append(error.square().mean() if error.numel() else error.sum())
    return total / (mask.sum() * prediction.shape[2]), torch.stack(rows)


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient_follow_the_error_rule(name, dtype, shape):
    args = inputs(*shape, dtype)
    args["mask"][0, 0] = True
    results = {}
    for which, run in (("exact", plain), ("plain", plain), ("ours", mean_velocity_loss)):
        wide = which == "exact"
        leaf = args["prediction"].double() if wide else args["prediction"].clone()
        leaf.requires_grad_()
        rest = {k: v.double() if wide and v.is_floating_point() else v for k, v in args.items()}
        rest.pop("prediction")
        if which == "ours":
            with backend(name), poisoned_memory():
                loss, rows = mean_velocity_loss(leaf, rest.pop("displacement"), **_named(rest))
                loss.backward()
        else:
            loss, rows = run(leaf, **rest)
            loss.backward()
        results[which] = (loss.detach(), rows.detach(), leaf.grad)
    for got, allowed, true in zip(*(results[k] for k in ("ours", "plain", "exact")), strict=True):
        assert_error_rule(got, allowed, true, atol=1e-5 * float(true.abs().max()) + 1e-7)


def _named(args):
    return {name: args[name] for name in ("t", "r", "velocity", "mask", "weights")}


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
def test_closed_form(name):
    """u = 3 against D = 1 over 1/2: error 1; against a velocity of 1 at r = t: error 4."""
    u = torch.full((2, 4, 5), 3.0, device=DEVICE)
    displacement = torch.ones_like(u)
    t = torch.tensor([0.25, 0.5], device=DEVICE)
    r = torch.tensor([0.75, 0.5], device=DEVICE)
    weights = torch.tensor([1.0, 3.0], device=DEVICE)
    with backend(name):
        loss, rows = mean_velocity_loss(
            u, displacement, t, r, velocity=torch.ones_like(u), weights=weights
        )
    torch.testing.assert_close(rows, torch.tensor([1.0, 4.0], device=DEVICE))
    torch.testing.assert_close(loss, torch.tensor((1.0 + 3 * 4.0) / 2, device=DEVICE))


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
def test_what_the_mask_hides_does_not_matter_nan_included(name):
    args = inputs(2, 9, 4)
    args["mask"][1] = False
    hidden = ~args["mask"]
    clean, _ = mean_velocity_loss(**args)
    leaf = args["prediction"].masked_fill(hidden[:, :, None], torch.nan).requires_grad_()
    args["displacement"][hidden] = torch.inf
    args["velocity"][hidden] = torch.nan
    with backend(name):
        loss, rows = mean_velocity_loss(**args | {"prediction": leaf})
        loss.backward()
    torch.testing.assert_close(loss, clean)
    assert float(rows[1]) == 0
    assert float(leaf.grad[hidden].abs().sum()) == 0


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
@pytest.mark.parametrize("boundary", [False, True])
def test_gradcheck(name, boundary):
    args = {
        key: value.double() if value is not None and value.is_floating_point() else value
        for key, value in inputs(3, 4, 2, boundary=boundary).items()
    }
    leaf = args.pop("prediction").requires_grad_()
    with backend(name):
        assert torch.autograd.gradcheck(lambda u: mean_velocity_loss(u, **args)[0], leaf)


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
def test_the_target_is_a_constant(name):
    args = inputs(2, 5, 4)
    leaves = [args[key].requires_grad_() for key in ("prediction", "displacement", "velocity")]
    with backend(name):
        mean_velocity_loss(**args)[0].backward()
    assert [leaf.grad is not None for leaf in leaves] == [True, False, False]


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
def test_a_given_interval_replaces_the_difference_of_rounded_times(name):
    args = inputs(2, 5, 4, boundary=False)
    with backend(name):
        loss, _ = mean_velocity_loss(**args)
        args["displacement"] = args["displacement"] * 2
        doubled, _ = mean_velocity_loss(**args, interval=2 * (args["r"] - args["t"]))
    torch.testing.assert_close(doubled, loss)


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
def test_strided_views(name):
    args = inputs(2, 12, 10)
    expected, _ = mean_velocity_loss(**args)
    for key in ("prediction", "displacement", "velocity"):
        args[key] = args[key].mT.contiguous().mT
    args["mask"] = args["mask"].t().contiguous().t()
    leaf = args["prediction"].requires_grad_()
    with backend(name):
        loss, _ = mean_velocity_loss(**args)
        (grad,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(loss, expected)
    with backend("reference"):
        (want,) = torch.autograd.grad(mean_velocity_loss(**args)[0], leaf)
    torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("name", kernel_backends())
@pytest.mark.parametrize("argument", ["t", "r", "displacement"])
def test_forward_mode_ad_is_refused(name, argument):
    args = inputs(1, 3, 2, boundary=False)

    def run(value):
        return mean_velocity_loss(**args | {argument: value})[0]

    with backend(name), pytest.raises(RuntimeError, match="forward-mode AD"):
        torch.func.jvp(run, (args[argument],), (torch.ones_like(args[argument]),))


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
def test_empty_batch_and_empty_mask_cost_nothing(name):
    with backend(name):
        loss, rows = mean_velocity_loss(**inputs(0, 4, 3))
        assert float(loss) == 0
        assert rows.shape == (0,)
        args = inputs(2, 4, 3)
        args["mask"][:] = False
        assert float(mean_velocity_loss(**args)[0]) == 0


@pytest.mark.parametrize("name", kernel_backends())
def test_opcheck(name):
    for boundary in (False, True):
        args = inputs(2, 5, 4, boundary=boundary)
        rest = (args["displacement"], args["r"] - args["t"], args["velocity"], args["mask"])
        with backend(name):
            torch.library.opcheck(_op, (args["prediction"].requires_grad_(), *rest))
            grad = torch.randn(2, device=DEVICE)
            torch.library.opcheck(_op_backward, (grad, args["prediction"].detach(), *rest))


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
def test_compiles_without_graph_breaks_or_recompiles(name):
    def run(*args):
        return mean_velocity_loss(*args[:4], velocity=args[4], mask=args[5], weights=args[6])[0]

    with backend(name):
        calls = (tuple(inputs(2, frames, 6).values()) for frames in (7, 12, 33))
        assert_compiles_once(run, *calls)
