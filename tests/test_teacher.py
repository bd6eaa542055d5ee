import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from imf_kernels import Teacher, grids
from tests.flows import FLOWS, GUIDED, Flow, Linear, relative_error, times

T = times(0.0, 0.15, 0.5)
R = times(1.0, 0.65, 0.8)


def state(rows=3, frames=5, channels=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, frames, channels, generator=generator, dtype=dtype)


# -- convergence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "gaussian"])
def test_converges_at_first_order_to_the_mean_velocity(name):
    flow, z = FLOWS[name], state()
    want = flow.mean_velocity(z, T, R)
    errors = []
    for nfe in (32, 64, 128):
        got = Teacher(flow).integrate(z, T, R, nfe).displacement / (R - T)[:, None, None]
        errors.append((got - want).flatten(1).norm(dim=1))
    for coarse, fine in itertools.pairwise(errors):
        ratio = coarse / fine
        assert ((ratio > 1.9) & (ratio < 2.1)).all(), ratio
    assert relative_error(got, want) < 0.01


@pytest.mark.parametrize("name", ["linear", "gaussian"])
@pytest.mark.parametrize("w", [0.0, 1.0, 1.7, 3.0])
def test_guided_teacher_converges_to_the_guided_mean_velocity(name, w):
    flow, z = GUIDED[name], state()
    teacher = Teacher(flow, w)
    cond = teacher.prepare(lengths=torch.full((3,), 5))
    want = flow.at(w).mean_velocity(z, T, R)
    error = [
        relative_error(
            teacher.integrate(z, T, R, nfe, cond).displacement / (R - T)[:, None, None], want
        )
        for nfe in (64, 128)
    ]
    assert 1.9 < error[0] / error[1] < 2.1
    assert error[1] < 0.02


@pytest.mark.parametrize("nfe", [1, 2, 7])
def test_constant_velocity_is_exact(nfe):
    z = state()
    run = Teacher(FLOWS["constant"]).integrate(z, T, R, nfe)
    want = FLOWS["constant"].carry(z, T, R)
    torch.testing.assert_close(run.z, want)
    torch.testing.assert_close(run.displacement, want - z)


def test_one_step_is_dt_times_velocity():
    flow, z = FLOWS["gaussian"], state()
    run = Teacher(flow).integrate(z, T, R, 1)
    torch.testing.assert_close(run.displacement, (R - T)[:, None, None] * flow.velocity(z, T))


def test_linear_closed_form_of_euler():
    flow, z = Linear(-1.2, 0.7), state(rows=1)
    slope, offset = flow.euler_mean_velocity(5)
    run = Teacher(flow).integrate(z, times(0.0), times(1.0), 5)
    torch.testing.assert_close(run.displacement, slope * z + offset)


# -- intervals ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(data=st.data(), first=st.integers(1, 4), second=st.integers(1, 4))
def test_splitting_an_interval_composes(data, first, second):
    """[t, s] then [s, r] with the sub-steps of the whole is [t, r]."""
    gap = st.floats(0.01, 0.3)
    t = times(*(data.draw(st.floats(0, 0.3)) for _ in range(2)))
    s = t + times(*(data.draw(gap) for _ in range(2)))
    r = s + times(*(data.draw(gap) for _ in range(2)))
    z, teacher = state(rows=2), Teacher(FLOWS["gaussian"])
    left = teacher.integrate(z, t, s, first)
    right = teacher.integrate(left.z, s, r, second)
    steps = torch.cat([left.times, right.times[1:]])
    spacing = (steps - t) / (r - t)
    spacing[0], spacing[-1] = 0.0, 1.0
    whole = teacher.integrate(z, t, r, first + second, spacing=spacing)
    torch.testing.assert_close(whole.z, right.z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        whole.displacement, left.displacement + right.displacement, rtol=1e-9, atol=1e-9
    )


def test_uniform_substeps_split_where_they_stand():
    z, teacher = state(), Teacher(FLOWS["linear"])
    s = T + (R - T) * 3 / 8
    left = teacher.integrate(z, T, s, 3)
    right = teacher.integrate(left.z, s, R, 5)
    whole = teacher.integrate(z, T, R, 8, keep=True)
    torch.testing.assert_close(whole.states[3], left.z)
    torch.testing.assert_close(whole.z, right.z)


def test_rows_have_their_own_intervals():
    z, teacher = state(), Teacher(FLOWS["gaussian"])
    run = teacher.integrate(z, T, R, 6, keep=True)
    for row in range(3):
        one = slice(row, row + 1)
        alone = teacher.integrate(z[one], T[one], R[one], 6, keep=True)
        torch.testing.assert_close(run.displacement[one], alone.displacement, rtol=0, atol=0)
        torch.testing.assert_close(run.states[:, one], alone.states, rtol=0, atol=0)


@settings(deadline=None, max_examples=15)
@given(order=st.permutations(range(4)))
def test_permuting_rows_permutes_outputs(order):
    z, lengths = state(rows=4), torch.tensor([5, 1, 3, 4])
    t, r, w = times(0.0, 0.1, 0.2, 0.9), times(1.0, 0.1, 0.7, 0.95), times(1.0, 2.0, 3.0, 0.5)
    order = torch.tensor(order)

    def displacement(z, t, r, w, lengths):
        teacher = Teacher(GUIDED["gaussian"], w)
        return teacher.integrate(z, t, r, 4, teacher.prepare(lengths=lengths)).displacement

    want = displacement(z, t, r, w, lengths)[order]
    got = displacement(z[order], t[order], r[order], w[order], lengths[order])
    assert torch.equal(got, want)


@pytest.mark.parametrize("length", [1e-3, 1e-4])
def test_short_intervals_keep_their_digits(length):
    """In float32 the state has lost them: x' - x is good to 1e-3 or 1e-4 only."""
    t = torch.tensor([0.0, 0.3, 0.9])
    r = t + length
    z = 10 + state(frames=50, dtype=torch.float32)
    for flow in (FLOWS["linear"], FLOWS["gaussian"]):
        run = Teacher(flow).integrate(z, t, r, 8, keep=True)
        exact = Teacher(flow).integrate(z.double(), t.double(), r.double(), 8, keep=True)
        assert relative_error(run.displacement, exact.displacement) < 2e-6
        assert relative_error(run.z - z, exact.displacement) > 1e-5
        for substep, want in zip(
            run.displacements.diff(dim=0), exact.displacements.diff(dim=0), strict=True
        ):
            assert relative_error(substep, want) < 2e-6


def test_times_stay_within_the_interval():
    t, r = torch.rand(2, 4000).square().sort(dim=0).values
    run = Teacher(FLOWS["constant"]).integrate(torch.zeros(4000, 1, 1), t, r, 3)
    assert (t + (r - t) > r).any(), "rounding would overshoot"
    assert torch.equal(run.times[0], t)
    assert (run.times <= r).all()
    torch.testing.assert_close(run.times[-1], r, rtol=0, atol=1e-7)


def test_interval_of_no_length_does_not_move():
    z = state()
    run = Teacher(FLOWS["gaussian"]).integrate(z, T, T, 3)
    assert torch.equal(run.z, z)
    assert not run.displacement.any()
    assert torch.equal(run.times, T.expand(4, 3))


# -- guidance -------------------------------------------------------------------------------------


def test_w_1_is_the_conditional_branch():
    flow, z = GUIDED["gaussian"], state()
    lengths = torch.full((3,), 5)
    want = Teacher(flow.conditional).integrate(z, T, R, 4).displacement
    for w in (None, 1, 1.0):
        teacher = Teacher(flow, w)
        cond = teacher.prepare(lengths=lengths)
        assert cond["lengths"].shape == (3,), "one branch only"
        assert torch.equal(teacher.integrate(z, T, R, 4, cond).displacement, want)
        assert torch.equal(teacher.velocity(z, T, cond), flow.conditional.velocity(z, T))
    teacher = Teacher(flow, torch.ones(3, dtype=torch.float64))
    cond = teacher.prepare(lengths=lengths)
    assert cond["lengths"].shape == (6,)
    torch.testing.assert_close(teacher.integrate(z, T, R, 4, cond).displacement, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_guidance_as_number_equals_guidance_as_tensor(dtype):
    flow, z = GUIDED["linear"], state(dtype=dtype)
    t, r = T.to(dtype), R.to(dtype)
    cond = flow.prepare(torch.full((3,), 5), guided=True)
    number = Teacher(flow, 2.5)
    tensor = Teacher(flow, torch.full((3,), 2.5, dtype=dtype))
    torch.testing.assert_close(
        number.integrate(z, t, r, 4, cond).displacement,
        tensor.integrate(z, t, r, 4, cond).displacement,
    )
    torch.testing.assert_close(number.velocity(z, t, cond), tensor.velocity(z, t, cond))


def test_guidance_per_row():
    flow, z = GUIDED["linear"], state()
    w = times(1.0, 2.0, 3.0)
    cond = flow.prepare(torch.full((3,), 5), guided=True)
    run = Teacher(flow, w).integrate(z, T, R, 4, cond)
    velocity = Teacher(flow, w).velocity(z, T, cond)
    for row, value in enumerate(w.tolist()):
        guided = flow.at(value)
        want = Teacher(guided).integrate(z, T, R, 4).displacement
        torch.testing.assert_close(run.displacement[row], want[row])
        torch.testing.assert_close(velocity[row], guided.velocity(z, T)[row])


# -- what a rollout holds -------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["uniform", "sway", "cosine", "epss"])
@pytest.mark.parametrize("nfe", [1, 5])
def test_named_spacing(spacing, nfe):
    run = Teacher(FLOWS["linear"]).integrate(state(), T, R, nfe, spacing=spacing)
    fractions = grids.make(spacing, nfe).double()[:, None]
    torch.testing.assert_close(run.times, T + (R - T) * fractions)
    assert torch.equal(run.times[0], T)
    assert (run.times <= R).all()


def test_custom_spacing():
    shared = torch.tensor([0.0, 0.1, 0.6, 1.0])
    rows = torch.stack([shared, torch.tensor([0.0, 0.4, 0.5, 1.0]), shared], dim=1)
    z, teacher = state(), Teacher(FLOWS["gaussian"])
    common = teacher.integrate(z, T, R, 3, spacing=shared)
    own = teacher.integrate(z, T, R, 3, spacing=rows)
    torch.testing.assert_close(common.times, T + (R - T) * shared[:, None].double())
    torch.testing.assert_close(own.times, T + (R - T) * rows.double())
    for row in (0, 2):
        torch.testing.assert_close(own.displacement[row], common.displacement[row])
    assert relative_error(own.displacement[1], common.displacement[1]) > 1e-3


def test_keep():
    z, flow = state(), FLOWS["gaussian"]
    plain = Teacher(flow).integrate(z, T, R, 6)
    assert plain.states is None
    assert plain.displacements is None
    run = Teacher(flow).integrate(z, T, R, 6, keep=True)
    assert run.states.shape == run.displacements.shape == (7, *z.shape)
    assert torch.equal(run.states[0], z)
    assert not run.displacements[0].any()
    assert torch.equal(run.states[-1], run.z)
    assert torch.equal(run.displacements[-1], run.displacement)
    assert torch.equal(run.displacement, plain.displacement)
    torch.testing.assert_close(run.states - z, run.displacements)
    for k in range(6):
        dt = (run.times[k + 1] - run.times[k])[:, None, None]
        want = run.states[k] + dt * flow.velocity(run.states[k], run.times[k])
        torch.testing.assert_close(run.states[k + 1], want)


def test_model_is_asked_at_the_ends_of_each_substep():
    flow = Linear(1.0, 0.0)
    run = Teacher(flow).integrate(state(), T, R, 3)
    assert len(flow.asked) == 3
    for k, (t, r) in enumerate(flow.asked):
        assert torch.equal(t, run.times[k])
        assert torch.equal(r, run.times[k + 1])
    Teacher(flow).velocity(state(), T)
    assert all(torch.equal(time, T) for time in flow.asked[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frames_beyond_the_lengths_do_not_move(dtype):
    """Nor does what lies there get out, were it NaN."""
    lengths = torch.tensor([5, 2, 1])
    inside = torch.arange(5) < lengths[:, None]
    z = state(dtype=dtype)
    dirty = torch.where(inside[:, :, None], z, float("nan"))
    t, r = T.to(dtype), R.to(dtype)
    teacher = Teacher(GUIDED["gaussian"], 2.0)
    cond = teacher.prepare(lengths=lengths)
    clean = teacher.integrate(z, t, r, 4, cond)
    run = teacher.integrate(dirty, t, r, 4, cond)
    assert torch.equal(clean.z[~inside], z[~inside])
    assert not clean.displacement[~inside].any()
    assert not run.displacement[~inside].any()
    assert torch.equal(run.displacement, clean.displacement)
    assert torch.equal(run.z[inside], clean.z[inside])
    free = teacher.integrate(z, t, r, 4, teacher.prepare(lengths=torch.full((3,), 5)))
    assert torch.equal(free.displacement[inside], clean.displacement[inside])


# -- the teacher as an object ---------------------------------------------------------------------


class Module(nn.Module):
    """A flow with a weight, a dropout and a dtype."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=dtype))
        self.dropout = nn.Dropout(0.5)
        self.dtype, self.inputs = dtype, []

    def prepare(self, scale, guided=False):
        return {"scale": scale * self.weight}

    def forward(self, x, t, r, cond):
        self.inputs.append((x.dtype, t.dtype, r.dtype))
        return self.dropout(x) * cond["scale"].to(x.dtype)


def test_no_gradient_reaches_the_teacher():
    teacher = Teacher(Module())
    z = state(dtype=torch.float32).requires_grad_()
    cond = teacher.prepare(scale=torch.tensor(2.0))
    run = teacher.integrate(z, T.float(), R.float(), 2, cond, keep=True)
    velocity = teacher.velocity(z, T.float(), cond)
    outputs = (cond["scale"], run.displacement, run.z, run.displacements, velocity)
    assert not any(tensor.requires_grad for tensor in outputs)


def test_dropout_is_off():
    module = Module().train()
    teacher = Teacher(module)
    assert not module.training
    z = torch.ones(2, 50, 4)
    assert torch.equal(teacher.velocity(z, z.new_zeros(2), {"scale": torch.ones(())}), z)


def test_state_is_float32_whatever_the_model_computes_in():
    module = Module(torch.bfloat16)
    teacher = Teacher(module)
    z, cond = state(dtype=torch.float32), {"scale": torch.ones(())}
    run = teacher.integrate(z, T.float(), R.float(), 3, cond)
    velocity = teacher.velocity(z, T.float(), cond)
    assert set(module.inputs) == {(torch.bfloat16, torch.float32, torch.float32)}
    assert {run.z.dtype, run.displacement.dtype, run.times.dtype, velocity.dtype} == {torch.float32}
    assert not torch.equal(run.displacement, run.displacement.bfloat16().float())


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: torch.compile(m, backend="eager")])
def test_autocast_does_not_reach_it(wrap):
    """In none of its evaluations, the conditioning included."""

    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def prepare(self, mu, guided):
            return [row @ self.weight for row in mu]

        def forward(self, x, t, r, cond):
            return x @ self.weight + torch.stack(cond)

    teacher, z = Teacher(Products()), torch.randn(3, 5, 4)
    compiled = Teacher(wrap(teacher.model))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            cond = teacher.prepare(mu=list(z))
            run = compiled.integrate(z, T.float(), R.float(), 2, cond)
            velocity = compiled.velocity(z, T.float(), cond)
            results.append((*cond, run.z, run.displacement, velocity))
            assert (z[0] @ z[0].T).dtype == (torch.bfloat16 if enabled else torch.float32)
    assert all(map(torch.equal, *results))


def test_teacher_stays_out_of_the_module_tree_and_is_shared_by_copies():
    holder = nn.Linear(2, 2)
    holder.teacher = Teacher(Module())
    assert {name for name, _ in holder.named_parameters()} == {"weight", "bias"}
    assert set(holder.state_dict()) == {"weight", "bias"}
    holder.train()
    assert not holder.teacher.model.training
    twin = copy.deepcopy(holder)
    assert twin.weight is not holder.weight
    assert twin.teacher is holder.teacher


def test_prepare_asks_for_both_branches_only_under_guidance():
    class Recorder(Flow):
        def prepare(self, guided):
            return guided

    assert Teacher(Recorder(), 3.0).prepare() is True
    assert Teacher(Recorder(), 0.0).prepare() is True
    assert Teacher(Recorder(), torch.ones(2)).prepare() is True
    assert Teacher(Recorder()).prepare() is False
    assert Teacher(Recorder(), 1).prepare() is False
