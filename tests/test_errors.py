"""A wrong argument: the error names the argument, what was expected and what was given."""

import math

import pytest
import torch

import imf_kernels
from imf_kernels import (
    Batch,
    DSFlow,
    IntMeanFlow,
    MeanFlow,
    SplitMeanFlow,
    Teacher,
    checks,
    grids,
    guidance,
    o3s,
)
from imf_kernels.distill import distill
from imf_kernels.models import DiTConfig
from imf_kernels.objectives import Intervals, LogitNormal, RolloutCache
from imf_kernels.ops import (
    Quantized,
    fp8_linear,
    guided_euler_step,
    mean_velocity_loss,
    quantize_rows,
)
from imf_kernels.sampler import sample
from tests.flows import FLOWS, GUIDED

NAN = math.nan
X = torch.randn(2, 5, 3)
T, R = torch.tensor([0.1, 0.2]), torch.tensor([0.5, 1.0])


def integrate(z=X, t=T, r=R, nfe=2, w=None, cond=None, **options):
    flow = FLOWS["linear"] if w is None else GUIDED["linear"]
    if cond is None:
        cond = flow.prepare(torch.full((2,), 5), guided=w is not None)
    return Teacher(flow, w).integrate(z, t, r, nfe, cond, **options)


def velocity(z=X, t=T, w=None):
    flow = FLOWS["linear"] if w is None else GUIDED["linear"]
    cond = flow.prepare(torch.full((2,), 5), guided=w is not None)
    return Teacher(flow, w).velocity(z, t, cond)


def draw(noise=X, grid="uniform", nfe=2, cond=None, guidance=None):
    return sample(FLOWS["linear"], noise, cond, grid, nfe=nfe, guidance=guidance)


def loss(prediction=X, displacement=X, t=T, r=R, **options):
    return mean_velocity_loss(prediction, displacement, t, r, **options)


def objective(kind=IntMeanFlow, **options):
    return kind(Teacher(FLOWS["linear"]), **options)


def batch(x1=X, lengths=(5, 2), **options):
    return Batch(x1, torch.as_tensor(lengths), **options)


def search(nfe=3, **options):
    return o3s.search(lambda grid: 0.0, nfe, higher_is_better=True, **options)


def train(updates=2, **options):
    student = torch.nn.Linear(1, 1)
    distill(student, lambda student, _: (student.bias.sum(), {}), [batch()] * 2, updates, **options)


def times(*values):
    return torch.tensor(values)


def product(x=(5, 32), weight=(16, 32), bias=None):
    operands = [
        Quantized(torch.empty(s).to(torch.float8_e4m3fn), torch.ones(s[0], 1)) for s in (x, weight)
    ]
    return fp8_linear(*operands, bias)


TABLE = [
    # call, argument, expected, given
    # -- teacher
    (lambda: integrate(z=X[0]), "z", "shape (B, N, C)", "(5, 3)"),
    (lambda: integrate(z=X.long()), "z", "torch.float32 or torch.float64", "torch.int64"),
    (lambda: integrate(z=X.bfloat16()), "z", "torch.float32 or torch.float64", "torch.bfloat16"),
    (lambda: integrate(z=[0.0]), "z", "a tensor", "list"),
    (lambda: integrate(t=T[:1]), "t", "shape (2,)", "(1,)"),
    (lambda: integrate(t=torch.tensor(0.1)), "t", "shape (2,)", "()"),
    (lambda: integrate(t=0.1), "t", "a tensor", "float"),
    (lambda: integrate(r=torch.ones(3)), "r", "shape (2,)", "(3,)"),
    (lambda: integrate(r=R[:, None]), "r", "shape (2,)", "(2, 1)"),
    (lambda: integrate(r=times(1, 1)), "r", "torch.float32 or torch.float64", "torch.int64"),
    (lambda: integrate(t=T.half()), "t", "torch.float32 or torch.float64", "torch.float16"),
    (lambda: integrate(t=times(NAN, 0.5)), "t", "times in [0, 1]", "[nan, 0.5]"),
    (lambda: integrate(r=times(0.5, NAN)), "r", "times in [0, 1]", "[0.5, nan]"),
    (lambda: integrate(t=times(-0.5, 0.0)), "t", "times in [0, 1]", "[-0.5, 0.0]"),
    (lambda: integrate(r=times(1.5, 1.0)), "r", "times in [0, 1]", "[1.5, 1.0]"),
    (
        lambda: integrate(t=times(0.25, 0.75), r=times(0.5, 0.5)),
        "t",
        "t <= r",
        "t = [0.25, 0.75], r = [0.5, 0.5]",
    ),
    *(
        (lambda nfe=nfe: integrate(nfe=nfe), "nfe", "an integer >= 1", repr(nfe))
        for nfe in (0, -3, 2.0, "4", True, None)
    ),
    (lambda: integrate(w=torch.ones(3)), "guidance", "shape (2,)", "(3,)"),
    (lambda: integrate(w=torch.ones(2, 1)), "guidance", "shape (2,)", "(2, 1)"),
    (lambda: integrate(w=NAN), "guidance", "a finite number", "nan"),
    (lambda: integrate(w=math.inf), "guidance", "a finite number", "inf"),
    (lambda: integrate(w=torch.ones(2).double()), "guidance", "torch.float32", "torch.float64"),
    pytest.param(
        lambda: integrate(spacing="linear"),
        "spacing",
        "one of uniform, sway, epss, cosine",
        "'linear'",
    ),
    (lambda: integrate(spacing=times(0.0, 1.0)), "spacing", "3", "2"),
    (lambda: integrate(spacing=times(0.0, 0.5, 0.9)), "spacing", "0 to 1", "0.89"),
    (lambda: integrate(spacing=torch.zeros(3, 4)), "spacing", "shape (3, 2)", "(3, 4)"),
    (
        lambda: integrate(spacing=times(0.0, 0.5, 1.0)[:, None].expand(3, 2).flip(0)),
        "spacing",
        "fractions ascending from 0 to 1",
        "1.0",
    ),
    (lambda: integrate(cond={"lengths": times(5)}), "lengths", "shape (2,)", "(1,)"),
    (lambda: integrate(cond={"lengths": times(5, 6)}), "lengths", "values in [1, 5]", "[5, 6]"),
    (lambda: integrate(cond={"lengths": times(0, 5)}), "lengths", "values in [1, 5]", "[0, 5]"),
    (
        lambda: integrate(cond={"lengths": times(5.0, 5.0)}),
        "lengths",
        "torch.int64 or torch.int32",
        "torch.float32",
    ),
    (
        lambda: Teacher(lambda x, t, r, cond: x[:, :, :1]).integrate(X, T, R, 2),
        "velocity",
        "2, 5, 3)",
        "2, 5, 1)",
    ),
    (lambda: velocity(z=X[0]), "z", "shape (B, N, C)", "(5, 3)"),
    (lambda: velocity(t=T[:1]), "t", "shape (2,)", "(1,)"),
    (lambda: velocity(t=times(0.5, NAN)), "t", "times in [0, 1]", "[0.5, nan]"),
    (lambda: velocity(w=torch.ones(1)), "guidance", "shape (2,)", "(1,)"),
    (lambda: velocity(w=NAN), "guidance", "a finite number", "nan"),
    # -- guidance
    (lambda: checks.guidance(torch.ones(3), X), "guidance", "shape (2,)", "(3,)"),
    (lambda: checks.guidance(-math.inf, X), "guidance", "a finite number", "-inf"),
    (lambda: guidance.combine(torch.ones(3, 5, 2), 2.0), "velocity", "2B", "3"),
    # -- grids
    *((lambda make=make: make(0), "nfe", "an integer >= 1", "0") for make in grids.NAMED.values()),
    (lambda: grids.uniform(2.5), "nfe", "an integer >= 1", "2.5"),
    (
        lambda: grids.make("linear", 4),
        "grid",
        "one of uniform, sway, epss, cosine",
        "'linear'",
    ),
    (lambda: grids.make("sway"), "nfe", "an integer for the named grid 'sway'", "None"),
    (lambda: grids.make([0.0, 1.0], 2), "grid", "3 times for nfe = 2", "2"),
    (lambda: grids.validate([0.0]), "grid", "shape (nfe + 1,) with nfe >= 1", "(1,)"),
    (lambda: grids.validate([]), "grid", "shape (nfe + 1,) with nfe >= 1", "(0,)"),
    (lambda: grids.validate([[0.0, 1.0]]), "grid", "shape (nfe + 1,) with nfe >= 1", "(1, 2)"),
    (lambda: grids.validate([0.0, NAN, 1.0]), "grid", "finite times", "[0.0, nan, 1.0]"),
    (lambda: grids.validate([0.0, 0.5]), "grid", "times from 0 to 1", "[0.0, 0.5]"),
    (lambda: grids.validate([0.25, 1.0]), "grid", "times from 0 to 1", "[0.25, 1.0]"),
    (lambda: grids.validate([1.0, 0.0]), "grid", "times from 0 to 1", "[1.0, 0.0]"),
    (
        lambda: grids.validate([0.0, 0.75, 0.5, 1.0]),
        "grid",
        "strictly ascending times",
        "[0.0, 0.75, 0.5, 1.0]",
    ),
    (
        lambda: grids.validate([0.0, 0.5, 0.5, 1.0]),
        "grid",
        "strictly ascending times",
        "[0.0, 0.5, 0.5, 1.0]",
    ),
    # -- sampler
    (lambda: draw(noise=X[0]), "noise", "shape (B, N, C)", "(5, 3)"),
    (lambda: draw(noise=X.half()), "noise", "torch.float32 or torch.float64", "torch.float16"),
    (lambda: draw(grid="linear"), "grid", "one of uniform, sway, epss, cosine", "'linear'"),
    (lambda: draw(nfe=None), "nfe", "an integer", "None"),
    (lambda: draw(nfe=0), "nfe", "an integer >= 1", "0"),
    (lambda: draw(grid=[0.0, 0.5, 1.0], nfe=3), "grid", "4 times for nfe = 3", "3"),
    (
        lambda: draw(grid=[0.0, 0.75, 0.5, 1.0], nfe=None),
        "grid",
        "strictly ascending times",
        "[0.0, 0.75, 0.5, 1.0]",
    ),
    (lambda: draw(grid=[0.0, 0.5], nfe=None), "grid", "times from 0 to 1", "[0.0, 0.5]"),
    (lambda: draw(guidance=torch.ones(3)), "guidance", "shape (2,)", "(3,)"),
    (lambda: draw(guidance=NAN), "guidance", "a finite number", "nan"),
    (lambda: draw(guidance=2.0), "cond", "4 rows (with guidance)", "2 rows"),
    (lambda: draw(cond={"lengths": times(5)}), "lengths", "shape (2,)", "(1,)"),
    (lambda: draw(cond={"lengths": times(5, 6)}), "lengths", "values in [1, 5]", "[5, 6]"),
    # -- loss and step
    (lambda: loss(r=T), "r", "r > t", "t = [0.1"),
    (lambda: loss(t=R, r=T), "t", "t <= r", "r = [0.1"),
    (lambda: loss(t=times(0.0, NAN)), "t", "times in [0, 1]", "[0.0, nan]"),
    (lambda: loss(t=T[:1]), "t", "shape (2,)", "(1,)"),
    (lambda: loss(prediction=X[0]), "prediction", "shape (B, N, C)", "(5, 3)"),
    (lambda: loss(prediction=X.long()), "prediction", "torch.float32", "torch.int64"),
    (lambda: loss(displacement=X[:, :4]), "displacement", "shape (2, 5, 3)", "(2, 4, 3)"),
    (lambda: loss(displacement=X.double()), "displacement", "torch.float32", "torch.float64"),
    (lambda: loss(velocity=X[:1]), "velocity", "shape (2, 5, 3)", "(1, 5, 3)"),
    (lambda: loss(mask=torch.ones(2, 4).bool()), "mask", "shape (2, 5)", "(2, 4)"),
    (lambda: loss(mask=torch.ones(2, 5)), "mask", "torch.bool", "torch.float32"),
    (lambda: loss(weights=torch.ones(3)), "weights", "shape (2,)", "(3,)"),
    (lambda: guided_euler_step(X, X, T[:1]), "dt", "shape (1, 2)", "(1, 1)"),
    (lambda: guided_euler_step(X, X, T, 2.0), "velocity", "4, 5, 3)", "2, 5, 3)"),
    # -- FP8
    (lambda: quantize_rows(X), "x", "shape (T, K)", "(2, 5, 3)"),
    (lambda: quantize_rows(X[0].long()), "x", "torch.float32", "torch.int64"),
    (lambda: product(weight=(16, 48)), "weight.q", "shape (N, 32)", "(16, 48)"),
    (lambda: product(weight=(24, 32)), "weight.q", "multiples of 16", "(24, 32)"),
    (lambda: product(bias=torch.ones(15)), "bias", "shape (16,)", "(15,)"),
    (lambda: product(bias=torch.ones(16)), "bias", "torch.bfloat16", "torch.float32"),
    (
        lambda: fp8_linear(Quantized(X[0], X[0]), Quantized(X[0], X[0]), None),
        "x.q",
        "torch.float8_e4m3fn",
        "torch.float32",
    ),
    # -- batch
    (lambda: batch(x1=X[0]), "x1", "shape (B, N, C)", "(5, 3)"),
    (lambda: batch(x1=X.half()), "x1", "torch.float32 or torch.float64", "torch.float16"),
    (lambda: batch(lengths=(5,)), "lengths", "shape (2,)", "(1,)"),
    (lambda: batch(lengths=(5, 6)), "lengths", "values in [1, 5]", "[5, 6]"),
    (lambda: batch(lengths=(0, 5)), "lengths", "values in [1, 5]", "[0, 5]"),
    (
        lambda: batch(lengths=(5.0, 2.0)),
        "lengths",
        "torch.int64 or torch.int32",
        "torch.float32",
    ),
    (
        lambda: batch(loss_mask=torch.ones(5, 2).bool()),
        "loss_mask",
        "shape (2, 5)",
        "(5, 2)",
    ),
    (lambda: batch(conditions={"lengths": times(5, 2)}), "conditions", "no `lengths`", "some"),
    (lambda: batch(loss_mask=torch.ones(2, 5)), "loss_mask", "torch.bool", "torch.float32"),
    # -- objective
    (lambda: objective(nfe=0), "nfe", "an integer >= 1", "0"),
    (lambda: objective(targets=0), "targets", "an integer >= 1", "0"),
    (
        lambda: objective(spacing="linear"),
        "spacing",
        "one of uniform, sway, cosine, jitter",
        "'linear'",
    ),
    (lambda: objective(source="model"), "source", "one of data, noise", "'model'"),
    (lambda: objective(region="prompt"), "region", "one of span, all", "'prompt'"),
    (
        lambda: objective(source="noise", intervals=Intervals(boundary=0.5)),
        "intervals",
        "nothing but `full` and `curriculum` with source 'noise'",
        "boundary=0.5",
    ),
    *(
        (lambda n=name, v=value: Intervals(**{n: v}), name, "a number > 0", str(value))
        for name in ("a", "b")
        for value in (0.0, -1.0, NAN)
    ),
    (lambda: Intervals(min_length=0.0), "min_length", "a number in (0, 1]", "0.0"),
    (lambda: Intervals(min_length=1.5), "min_length", "a number in (0, 1]", "1.5"),
    (lambda: Intervals(full=1.5), "full", "a share in [0, 1]", "1.5"),
    (lambda: Intervals(boundary=-0.5), "boundary", "a share in [0, 1]", "-0.5"),
    (lambda: Intervals(boundary=NAN), "boundary", "a share in [0, 1]", "nan"),
    (
        lambda: Intervals(full=0.75, boundary=0.5),
        "full",
        "full + boundary <= 1",
        "0.75 + 0.5",
    ),
    *(
        (lambda v=value: Intervals(curriculum=v), "curriculum", wanted, got)
        for value, wanted, got in [
            (0.5, "(first, share)", "0.5"),
            ((0.5,), "(first, share)", "(0.5,)"),
            ((0.0, 0.5), "a finite number in [0.001, 1]", "0.0"),
            ((1.5, 0.5), "a finite number in [0.001, 1]", "1.5"),
            ((0.5, 0.0), "a share > 0", "0.0"),
            ((0.5, 2.0), "a finite number in [0, 1]", "2.0"),
            ((0.5, NAN), "a finite number in [0, 1]", "nan"),
        ]
    ),
    (lambda: Intervals().draw(2, progress=1.5), "progress", "a finite number in [0, 1]", "1.5"),
    (lambda: RolloutCache(0), "capacity", "an integer >= 1", "0"),
    (lambda: RolloutCache(2, refresh=2.0), "refresh", "a share in [0, 1]", "2.0"),
    # -- search
    (lambda: search(nfe=0), "nfe", "an integer >= 1", "0"),
    (lambda: search(tolerance=0.0), "tolerance", "a number > 0", "0.0"),
    (lambda: search(tolerance=NAN), "tolerance", "a number > 0", "nan"),
    (lambda: search(min_gap=0.0), "min_gap", "a number in (0, 1 / nfe)", "0.0"),
    (lambda: search(min_gap=0.5), "min_gap", "a number in (0, 1 / nfe)", "0.5"),
    (lambda: search(method="bisect"), "method", "one of ternary, golden", "'bisect'"),
    (lambda: search(budget=0), "budget", "an integer >= 1", "0"),
    (lambda: search(max_sweeps=0), "max_sweeps", "an integer >= 1", "0"),
    (lambda: search(start=[0.0, 1.0]), "start", "4 times for nfe = 3", "2"),
    pytest.param(
        lambda: search(start=[0.0, 0.25, 0.2500001, 1.0]),
        "start",
        "neighbours at least 0.001 apart",
        "[0.0, 0.25, 0.25",
    ),
    *[
        (lambda k=kind: objective(k, region="prompt"), "region", "one of span, all", "'prompt'")
        for kind in (SplitMeanFlow, DSFlow, MeanFlow)
    ],
    (
        lambda: objective(SplitMeanFlow, intervals=Intervals()),
        "intervals",
        "a share `boundary` > 0",
        "boundary=0.0",
    ),
    (lambda: objective(DSFlow, counts=()), "counts", "one step count or more", "()"),
    (lambda: objective(DSFlow, counts=(1, 0)), "counts", "an integer >= 1", "0"),
    (lambda: objective(DSFlow, nfe=6), "nfe", "a multiple of 4", "6"),
    (lambda: objective(DSFlow, endpoint=1.5), "endpoint", "a share in [0, 1]", "1.5"),
    (lambda: objective(DSFlow, p_uncond=NAN), "p_uncond", "a share in [0, 1]", "nan"),
    (lambda: objective(DSFlow, uncond=-1.0), "uncond", "a number >= 0", "-1.0"),
    (lambda: objective(DSFlow, spacing="epss"), "spacing", "one of uniform, sway", "'epss'"),
    (
        lambda: objective(MeanFlow, derivative="reverse"),
        "derivative",
        "one of jvp, difference",
        "'reverse'",
    ),
    (lambda: objective(MeanFlow, step=0.0), "step", "a number in (0, 1)", "0.0"),
    (lambda: objective(MeanFlow, adaptive=0.0), "adaptive", "a number > 0 or None", "0.0"),
    (lambda: objective(MeanFlow, one_sided=True), "one_sided", "False with derivative", "True"),
    (lambda: LogitNormal(std=0.0), "std", "a number > 0", "0.0"),
    (lambda: LogitNormal(boundary=1.5), "boundary", "a share in [0, 1]", "1.5"),
    # -- training loop
    (lambda: train(updates=0), "updates", "an integer >= 1", "0"),
    (lambda: train(updates=3), "batches", "3 batches", "2"),
    (lambda: train(warmup=-5), "warmup", "an integer in [0, 2]", "-5"),
    (lambda: train(clip=0.0), "clip", "a number > 0", "0.0"),
    (lambda: train(ema_decay=NAN), "ema_decay", "a number in [0, 1)", "nan"),
    # -- choices
    (
        lambda: imf_kernels.backend("cuda").__enter__(),
        "backend",
        "one of auto, reference, cpp, triton",
        "'cuda'",
    ),
    (
        lambda: DiTConfig.for_variant("f5_v2", dim=8, depth=1, heads=1),
        "variant",
        "one of f5_v0, f5_v1, cosyvoice3",
        "'f5_v2'",
    ),
]


@pytest.mark.parametrize(
    ("call", "argument", "expected", "given"),
    TABLE,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_error_names_argument_expectation_and_value(call, argument, expected, given):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(f"{argument}: expected "), message
    wanted, _, got = message.partition("got ")
    assert expected in wanted, message
    assert given in got, message


def test_the_same_arguments_without_the_mistake_pass():
    integrate()
    integrate(w=torch.ones(2))
    integrate(spacing=times(0.0, 0.5, 1.0)[:, None].expand(3, 2))
    velocity()
    velocity(w=torch.ones(2))
    draw()
    loss()
    loss(r=T, velocity=X)
    batch()
    objective()
    search()
    train()
    product(bias=torch.ones(16).bfloat16())
    with imf_kernels.backend("reference"):
        integrate()


def test_a_wrong_argument_is_caught_before_the_model_is_asked():
    def model(x, t, r, cond):
        raise AssertionError("asked")

    for call in (
        lambda: Teacher(model).integrate(X, R, T, 2),
        lambda: Teacher(model, torch.ones(3)).integrate(X, T, R, 2),
        lambda: Teacher(model).velocity(X, times(0.5, NAN)),
        lambda: sample(model, X, grid=[0.0, 0.5]),
        lambda: sample(model, X, nfe=2, guidance=NAN),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()
