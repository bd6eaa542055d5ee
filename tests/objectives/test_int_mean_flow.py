import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from imf_kernels import Batch, IntMeanFlow, MeanFlow, SplitMeanFlow, Teacher
from imf_kernels.objectives import Intervals, LogitNormal, RolloutCache, TeacherRollout
from imf_kernels.objectives.rollouts import draw_pairs
from tests.flows import FLOWS, GUIDED, Gaussian, Linear, MeanVelocity, relative_error
from tests.objectives.tools import Scale, Small, Wrapped, batch, seeded

FULL = Intervals(full=1.0)


# -- the target -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "gaussian"])
@pytest.mark.parametrize("source", ["data", "noise"])
@pytest.mark.parametrize("w", [None, 2.0])
def test_exact_student_has_no_loss_but_the_rollout_error(name, source, w):
    """The target is the (guided) mean velocity up to first order in 1 / n."""
    flow = FLOWS[name] if w is None else GUIDED[name]
    student = (flow if w is None else flow.at(w)).student()
    errors = []
    for nfe in (32, 64, 128):
        objective = IntMeanFlow(
            Teacher(flow, w),
            nfe=nfe,
            source=source,
            intervals=FULL if source == "noise" else None,
            generator=seeded(),
        )
        loss, _ = objective(student, batch())
        errors.append(math.sqrt(loss))
    assert 1.85 < errors[0] / errors[1] < 2.15
    assert 1.9 < errors[1] / errors[2] < 2.1
    assert errors[-1] < 0.05


@pytest.mark.parametrize("source", ["data", "noise"])
def test_every_pair_of_a_rollout_is_a_mean_velocity(source):
    flow, nfe = FLOWS["gaussian"], 64
    objective = IntMeanFlow(Teacher(flow), nfe=nfe, source=source, targets=2, generator=seeded())
    rollout = objective.rollout(batch())
    for i, j in [(0, 64), (0, 1), (63, 64), (10, 50), (31, 33)]:
        target = rollout.pair(torch.full((6,), i), torch.full((6,), j))
        got = target.displacement / (target.r - target.t)[:, None, None]
        want = flow.mean_velocity(target.z, target.t, target.r)
        bound = 6 * (target.r - target.t) / (j - i)  # the length of a sub-step
        assert ((got - want).abs().amax((1, 2)) <= bound).all()


def test_pairs_differ_per_row():
    flow = Linear(-1.0, 0.5)
    objective = IntMeanFlow(Teacher(flow), nfe=4, targets=2, generator=seeded())
    rollout = objective.rollout(batch(rows=3))
    i, j = torch.tensor([0, 1, 2]), torch.tensor([4, 2, 3])
    target = rollout.pair(i, j)
    for row in range(3):
        a, b = int(i[row]), int(j[row])
        assert torch.equal(target.z[row], rollout.states[a, row])
        assert target.t[row] == rollout.times[a, row]
        assert target.r[row] == rollout.times[b, row]
        torch.testing.assert_close(
            target.displacement[row], rollout.states[b, row] - rollout.states[a, row]
        )


def test_pairs_of_short_intervals_keep_their_digits():
    flow, nfe = FLOWS["gaussian"], 8
    objective = IntMeanFlow(
        Teacher(flow), nfe=nfe, intervals=Intervals(a=0.05, b=50.0), targets=2, generator=seeded()
    )
    rollout = objective.rollout(batch(rows=64, dtype=torch.float32))
    for k in range(nfe):
        target = rollout.pair(torch.full((64,), k), torch.full((64,), k + 1))
        got = target.displacement / target.interval[:, None, None]
        want = flow.velocity(target.z.double(), target.t.double())
        assert relative_error(got, want) < 1e-5


def test_source_data_lies_on_the_line_from_noise_to_data():
    objective = IntMeanFlow(Teacher(FLOWS["constant"]), nfe=3, generator=seeded())
    material = batch(rows=400, frames=10)
    rollout = objective.rollout(material)
    t = rollout.times[0][:, None, None]
    noise = (rollout.states[0] - t * material.x1) / (1 - t)
    assert float(noise.mean()) == pytest.approx(0, abs=0.05)
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    correlation = torch.corrcoef(torch.stack([noise.flatten(), material.x1.flatten()]))
    assert abs(float(correlation[0, 1])) < 0.05


def test_source_noise_starts_at_noise_and_covers_all_times():
    objective = IntMeanFlow(Teacher(Linear(0.0, 1.0)), nfe=4, source="noise", generator=seeded())
    rollout = objective.rollout(batch(rows=400, frames=10))
    assert torch.equal(rollout.times[:, 0], torch.linspace(0, 1, 5, dtype=torch.float64))
    assert float(rollout.states[0].std()) == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(rollout.states[-1], rollout.states[0] + 1)


@pytest.mark.parametrize("w", [None, 3.0])
def test_boundary_rows_get_the_guided_velocity(w):
    flow = GUIDED["gaussian"]
    options = {"nfe": 2, "intervals": Intervals(boundary=1.0), "targets": 2}
    objective = IntMeanFlow(Teacher(flow, w), generator=seeded(), **options)
    loss, info = objective(flow.at(1.0 if w is None else w).student(), batch())
    assert float(loss) < 1e-20
    assert not info["interval"].any()
    other, _ = objective(flow.at(2.0).student(), batch())
    assert float(other) > 1e-3


def test_boundary_rows_among_others():
    flow = FLOWS["gaussian"]
    objective = IntMeanFlow(
        Teacher(flow), nfe=2, intervals=Intervals(boundary=0.5), generator=seeded()
    )
    _, info = objective(flow.student(), batch(rows=40))
    instant = info["interval"] == 0
    assert 10 < instant.sum() < 30
    assert info["row_error"][instant].max() < 1e-20
    assert info["row_error"][~instant].min() > 1e-12


# -- what counts in the loss ----------------------------------------------------------------------


def test_weighting():
    objective = IntMeanFlow(Teacher(FLOWS["linear"]), nfe=2, generator=seeded())
    lengths = [5, 1, 2, 3, 4, 5]
    plain, info = objective(FLOWS["constant"].student(), batch(lengths=lengths))
    frames = torch.tensor(lengths, dtype=torch.float64)
    torch.testing.assert_close(plain, (info["row_error"] * frames).sum() / frames.sum())

    seen = []

    def weighting(t, r):
        seen.append((t, r))
        return r - t

    objective = IntMeanFlow(
        Teacher(FLOWS["linear"]), nfe=2, weighting=weighting, generator=seeded()
    )
    weighted, same = objective(FLOWS["constant"].student(), batch(lengths=lengths))
    torch.testing.assert_close(same["row_error"], info["row_error"])
    torch.testing.assert_close(seen[0][1] - seen[0][0], info["interval"])
    want = (info["interval"] * info["row_error"] * frames).sum() / frames.sum()
    torch.testing.assert_close(weighted, want)


class Wrong(MeanVelocity):
    """Exact, but for the frames in `where`."""

    def __init__(self, flow, where):
        super().__init__(flow)
        self.where = where

    def __call__(self, x, t, r, cond):
        return super().__call__(x, t, r, cond) + self.where[:, :, None]


def test_region():
    flow = FLOWS["constant"]
    span = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    inside = torch.arange(5) < torch.tensor([[5], [4]])
    material = batch(rows=2, lengths=[5, 4], loss_mask=span)

    def loss(region, where, material=material):
        objective = IntMeanFlow(Teacher(flow), nfe=2, region=region, generator=seeded())
        return float(objective(Wrong(flow, where), material)[0])

    assert loss("all", ~inside) == pytest.approx(0, abs=1e-20)
    assert loss("span", ~(span & inside)) == pytest.approx(0, abs=1e-20)
    assert loss("span", span) == pytest.approx(1)
    assert loss("all", span) == pytest.approx(3 / 9)
    assert loss("all", inside) == pytest.approx(1)
    unmasked = batch(rows=2, lengths=[5, 4])
    assert loss("span", ~inside, unmasked) == pytest.approx(0, abs=1e-20)
    assert loss("span", inside, unmasked) == pytest.approx(1)


@pytest.mark.parametrize("region", ["span", "all"])
def test_rollout_covers_all_valid_frames(region):
    mask = torch.zeros(6, 5, dtype=torch.bool)
    material = batch(loss_mask=mask, lengths=[5, 4, 3, 2, 1, 5])
    rollout = IntMeanFlow(Teacher(Linear(0.0, 1.0)), nfe=2, region=region).rollout(material)
    moved = rollout.displacements[-1].ne(0).all(-1)
    assert torch.equal(moved, material.valid())


# -- several targets, cached rollouts -------------------------------------------------------------


@pytest.mark.parametrize("source", ["data", "noise"])
def test_several_targets_of_one_rollout(source):
    flow = Linear(-1.2, 0.7)
    teacher = Teacher(flow)
    student = Scale(torch.float64)
    objective = IntMeanFlow(teacher, nfe=5, source=source, targets=3, generator=seeded())
    loss, info = objective(student, batch())
    assert len(flow.asked) == 5
    assert len(student.inputs) == 3
    assert info["row_error"].shape == info["interval"].shape == (18,)
    torch.testing.assert_close(loss.detach(), info["row_error"].mean())

    again = IntMeanFlow(teacher, nfe=5, source=source, targets=3, generator=seeded())
    rollout = again.rollout(batch())
    for k, (z, t, r, _) in enumerate(student.inputs):
        torch.testing.assert_close(info["interval"][6 * k : 6 * k + 6], r - t)
        for row in range(6):
            here = (rollout.times[:, row] == t[row]).nonzero().item()
            assert torch.equal(z[row], rollout.states[here, row])
            assert r[row] in rollout.times[here + 1 :, row]
    whole = [
        bool((r - t == rollout.times[-1] - rollout.times[0]).all()) for _, t, r, _ in student.inputs
    ]
    assert whole == [source == "data", False, False]


def test_full_share_of_pairs():
    objective = IntMeanFlow(
        Teacher(FLOWS["linear"]), nfe=4, source="noise", intervals=FULL, targets=2
    )
    _, info = objective(Scale(torch.float64), batch())
    assert (info["interval"] == 1).all()


def test_pairs_are_uniform():
    i, j = draw_pairs(4, 20_000, 0.0, seeded(), torch.device("cpu"))
    counts = torch.bincount(5 * i + j, minlength=25).view(5, 5)
    assert not counts.tril().any()
    share = counts[counts > 0] / 20_000
    assert share.shape == (10,)
    assert (share - 0.1).abs().max() < 0.015
    i, j = draw_pairs(4, 20_000, 0.5, seeded(), torch.device("cpu"))
    assert ((i == 0) & (j == 4)).float().mean() == pytest.approx(0.55, abs=0.02)


@pytest.mark.parametrize(
    ("refresh", "calls"), [(0.0, range(3, 4)), (1.0, range(12, 13)), (0.5, range(5, 11))]
)
def test_cache_pays_the_teacher_once(refresh, calls):
    flow = Linear(-1.2, 0.7)
    cache = RolloutCache(3, refresh=refresh, generator=seeded())
    objective = IntMeanFlow(Teacher(flow), nfe=4, cache=cache, generator=seeded())
    for _ in range(12):
        objective(Scale(torch.float64), batch())
    assert len(cache) == 3
    assert cache.nbytes == 3 * 2 * batch().x1.nbytes
    assert len(flow.asked) % 4 == 0
    assert len(flow.asked) // 4 in calls


def test_boundary_costs_one_more_evaluation():
    flow = Linear(-1.2, 0.7)
    objective = IntMeanFlow(Teacher(flow), nfe=4, intervals=Intervals(boundary=0.5))
    objective(Scale(torch.float64), batch())
    assert len(flow.asked) == 5


def test_cache_deals_batch_and_rollout_together():
    cache = RolloutCache(1)
    objective = IntMeanFlow(Teacher(FLOWS["linear"]), nfe=2, cache=cache)
    student = Scale(torch.float64)
    first = batch(lengths=[1, 2, 3, 4, 5, 5])
    objective(student, first)
    objective(student, batch(rows=2))
    for z, _, _, cond in student.inputs:
        assert z.shape == first.x1.shape
        assert cond["lengths"] is first.lengths


def test_cache_forgets_the_oldest():
    cache = RolloutCache(3, refresh=0.3, generator=seeded())
    rollouts = [TeacherRollout(batch(), *([torch.tensor(k)] * 4), None) for k in range(6)]
    for k, rollout in enumerate(rollouts):
        cache.add(rollout)
        assert len(cache) == min(k + 1, 3)
        dealt = [int(cache.deal().times) for _ in range(90)]
        assert set(dealt) == set(range(max(k - 2, 0), k + 1))
    assert min(dealt.count(k) for k in (3, 4, 5)) > 15
    assert sum(cache.wants_new() for _ in range(1000)) == pytest.approx(300, abs=60)


# -- draws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"source": "noise"}, {"spacing": "jitter", "targets": 3}])
def test_reproducible_with_a_generator(options):
    def run(seed):
        generator = seeded(seed)
        objective = IntMeanFlow(Teacher(FLOWS["gaussian"]), generator=generator, **options)
        losses = [objective(FLOWS["linear"].student(), batch())[0] for _ in range(2)]
        return torch.stack(losses)

    before = torch.get_rng_state()
    first = run(1)
    assert torch.equal(torch.get_rng_state(), before), "drew from the global generator"
    assert torch.equal(run(1), first)
    assert not torch.equal(run(2), first)
    assert first[0] != first[1]


@pytest.mark.parametrize("nfe", [1, 2, 5])
@pytest.mark.parametrize("source", ["data", "noise"])
def test_jitter_ascends_and_sees_all_times(nfe, source):
    objective = IntMeanFlow(
        Teacher(FLOWS["constant"]),
        nfe=nfe,
        spacing="jitter",
        source=source,
        targets=min(nfe, 2),
        generator=seeded(),
    )
    times = objective.rollout(batch(rows=2000, frames=1)).times
    fractions = (times - times[0]) / (times[-1] - times[0])
    assert (times.diff(dim=0) > 0).all()
    for k in range(1, nfe):
        assert fractions[k].min() > (k - 0.5) / nfe
        assert fractions[k].max() < (k + 0.5) / nfe
        assert fractions[k].min() < (k - 0.47) / nfe
        assert fractions[k].max() > (k + 0.47) / nfe


@pytest.mark.parametrize("spacing", ["uniform", "sway", "cosine"])
def test_named_spacing_reaches_the_teacher(spacing):
    objective = IntMeanFlow(Teacher(FLOWS["constant"]), nfe=4, spacing=spacing, source="noise")
    times = objective.rollout(batch()).times[:, 0]
    k = torch.arange(5, dtype=torch.float64) / 4
    want = k if spacing == "uniform" else 1 - torch.cos(math.pi / 2 * k)
    torch.testing.assert_close(times, want, rtol=0, atol=2e-7)


def test_default_intervals_are_two_sorted_uniform_draws():
    t, r = Intervals().draw(100_000, seeded())
    assert float(t.mean()) == pytest.approx(1 / 3, abs=0.005)
    assert float(r.mean()) == pytest.approx(2 / 3, abs=0.005)
    covariance = torch.cov(torch.stack([t, r]))
    want = torch.tensor([[2.0, 1.0], [1.0, 2.0]]) / 36
    torch.testing.assert_close(covariance, want, rtol=0, atol=0.001)
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    below = (t[:, None] <= quantiles).float().mean(0)
    torch.testing.assert_close(below, 1 - (1 - quantiles) ** 2, rtol=0, atol=0.006)
    below = (r[:, None] <= quantiles).float().mean(0)
    torch.testing.assert_close(below, quantiles**2, rtol=0, atol=0.006)


@pytest.mark.parametrize(("a", "b"), [(1.0, 2.0), (0.5, 1.0), (2.0, 3.0), (1.0, 1.0)])
def test_length_distribution(a, b):
    t, r = Intervals(a=a, b=b).draw(50_000, seeded())
    length = r - t
    d = torch.tensor([0.1, 0.3, 0.5, 0.8])
    share = (length[:, None] <= d).float().mean(0)
    torch.testing.assert_close(share, 1 - (1 - d**a) ** b, rtol=0, atol=0.01)
    usable = length < 0.95
    start = (t / (1 - length))[usable]
    assert float(start.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(start.std()) == pytest.approx(12**-0.5, abs=0.01)
    correlation = torch.corrcoef(torch.stack([start, length[usable]]))
    assert abs(float(correlation[0, 1])) < 0.02


@settings(deadline=None, max_examples=60)
@given(
    a=st.floats(0.05, 10),
    b=st.floats(0.05, 50),
    min_length=st.floats(1e-5, 1.0),
    full=st.floats(0, 1),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_bounds_of_intervals(a, b, min_length, full, share, seed):
    boundary = share * (1 - full)
    intervals = Intervals(a=a, b=b, min_length=min_length, full=full, boundary=boundary)
    t, r = intervals.draw(200, seeded(seed))
    assert t.dtype == r.dtype == torch.float32
    assert (t >= 0).all()
    assert (r <= 1).all()
    assert ((r - t >= min_length - 1e-7) | (r == t)).all()
    if boundary == 0:
        assert (r > t).all()


def test_times_that_are_no_intervals():
    with pytest.raises(TypeError, match=r"intervals: expected Intervals, got LogitNormal\(mean="):
        IntMeanFlow(Teacher(FLOWS["linear"]), intervals=LogitNormal())


def test_shares_of_intervals():
    t, r = Intervals(full=0.2, boundary=0.3).draw(20_000, seeded())
    assert ((t == 0) & (r == 1)).float().mean() == pytest.approx(0.2, abs=0.01)
    assert (t == r).float().mean() == pytest.approx(0.3, abs=0.01)
    t, r = Intervals(full=1.0).draw(50)
    assert (t == 0).all()
    assert (r == 1).all()
    t, r = Intervals(boundary=1.0).draw(50)
    assert (t == r).all()
    assert t.unique().numel() == 50


# -- broader intervals later ----------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(1.0, 2.0), (0.5, 1.0), (2.0, 3.0)])
@pytest.mark.parametrize(("progress", "largest"), [(0.0, 0.2), (0.25, 0.6), (0.5, 1.0), (1.0, 1.0)])
def test_curriculum_bounds_the_lengths_and_keeps_their_distribution(a, b, progress, largest):
    intervals = Intervals(a=a, b=b, curriculum=(0.2, 0.5))
    t, r = intervals.draw(50_000, seeded(), progress=progress)
    length = r - t
    assert 0.98 * largest < length.max() <= largest + 1e-6
    d = largest * torch.tensor([0.1, 0.3, 0.5, 0.8])
    want = (1 - (1 - d**a) ** b) / (1 - (1 - largest**a) ** b)
    torch.testing.assert_close((length[:, None] <= d).float().mean(0), want, rtol=0, atol=0.01)
    start = (t / (1 - length))[length < 0.95]
    assert float(start.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(start.std()) == pytest.approx(12**-0.5, abs=0.01)
    if largest == 1:
        plain = Intervals(a=a, b=b).draw(50_000, seeded())
        assert torch.equal(t, plain[0])
        assert torch.equal(r, plain[1])


def test_full_intervals_are_the_largest_of_the_curriculum():
    intervals = Intervals(full=0.3, boundary=0.2, curriculum=[0.25, 1.0])
    t, r = intervals.draw(20_000, seeded(), progress=1 / 3)
    largest = (r - t - 0.5).abs() < 1e-6
    assert largest.float().mean() == pytest.approx(0.3, abs=0.01)
    assert float(t[largest].mean()) == pytest.approx(0.25, abs=0.01)
    assert (t == r).float().mean() == pytest.approx(0.2, abs=0.01)


def test_curriculum_bounds_the_pairs_of_a_rollout():
    for span in (1, 2, 4):
        i, j = draw_pairs(4, 20_000, 0.0, seeded(), torch.device("cpu"), span)
        counts = torch.bincount(5 * i + j, minlength=25).view(5, 5)
        allowed = torch.ones(5, 5).triu(1).tril(span).bool()
        assert not counts[~allowed].any()
        share = counts[allowed] / 20_000
        assert (share - 1 / allowed.sum()).abs().max() < 0.015
        i, j = draw_pairs(4, 20_000, 1.0, seeded(), torch.device("cpu"), span)
        assert torch.equal(j - i, torch.full_like(i, span))
        share = torch.bincount(i) / 20_000
        torch.testing.assert_close(share, torch.ones_like(share) / (5 - span), rtol=0, atol=0.015)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (IntMeanFlow, {"nfe": 8}),
        (IntMeanFlow, {"nfe": 8, "source": "noise"}),
        (SplitMeanFlow, {}),
        (MeanFlow, {"derivative": "difference"}),
    ],
)
def test_progress_of_an_objective(kind, options):
    boundary = 0.0 if kind is IntMeanFlow else 0.2
    intervals = Intervals(curriculum=(0.25, 0.5), boundary=boundary)
    teacher = Teacher(FLOWS["gaussian"])
    objective = kind(teacher, intervals=intervals, generator=seeded(), **options)
    for progress, largest in [(None, 0.25), (0.25, 0.625), (1.0, 1.0)]:
        if progress is not None:
            objective.progress = progress
        _, info = objective(Scale(torch.float64), batch(rows=400))
        assert 0.85 * largest < info["interval"].max() < largest + 1e-6


# -- who is touched -------------------------------------------------------------------------------


class TeacherModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(-0.8))
        self.guided = []

    def prepare(self, lengths, shift, guided=False):
        self.guided.append(guided)
        return {"lengths": lengths.repeat(1 + guided), "shift": shift * self.slope}

    def forward(self, x, t, r, cond):
        v = self.slope * x + cond["shift"][:, None, None]
        return torch.cat([v, 0.5 * v]) if self.guided[-1] else v


@pytest.mark.parametrize("source", ["data", "noise"])
@pytest.mark.parametrize("w", [None, 2.0])
def test_gradients_reach_the_student_alone(source, w):
    model, student = TeacherModule(), Scale()
    shift = torch.arange(6.0).requires_grad_()
    material = batch(dtype=torch.float32, conditions={"shift": shift})
    material.x1.requires_grad_()
    objective = IntMeanFlow(Teacher(model, w), nfe=3, source=source, targets=2)
    loss, info = objective(student, material)
    assert not any(value.requires_grad for value in info.values())
    loss.backward()
    assert student.weight.grad.abs().min() > 0
    assert model.slope.grad is None
    assert shift.grad is None
    assert material.x1.grad is None
    assert set(model.guided) == {w is not None}


def test_conditions_reach_teacher_and_student():
    shift = torch.arange(6.0)
    student = Scale()
    objective = IntMeanFlow(Teacher(TeacherModule()), nfe=1, intervals=FULL, source="noise")
    material = batch(dtype=torch.float32, conditions={"shift": shift})
    objective(student, material)
    _, _, _, cond = student.inputs[0]
    assert cond["shift"] is shift
    assert cond["lengths"] is material.lengths
    rollout = objective.rollout(material)
    want = -0.8 * (rollout.states[0] + shift[:, None, None])
    torch.testing.assert_close(rollout.displacements[-1], want)


def test_loss_gradient_is_that_of_the_regression():
    flow, student = FLOWS["linear"], Scale(torch.float64)
    material = batch(lengths=[5, 4, 3, 2, 1, 5])
    objective = IntMeanFlow(Teacher(flow), nfe=3, generator=seeded())
    loss, _ = objective(student, material)
    (got,) = torch.autograd.grad(loss, student.weight)
    z, t, r, _ = student.inputs[0]
    target = Teacher(flow).integrate(z, t, r, 3).displacement / (r - t)[:, None, None]
    error = (student.weight[0] * z + student.weight[1] - target)[material.valid()]
    (want,) = torch.autograd.grad(error.square().mean(), student.weight)
    torch.testing.assert_close(loss, error.square().mean())
    torch.testing.assert_close(got, want)


def test_student_is_asked_in_its_own_dtype():
    student = Scale(torch.bfloat16)
    student.dtype = torch.bfloat16
    loss, _ = IntMeanFlow(Teacher(FLOWS["linear"]), nfe=2)(student, batch(dtype=torch.float32))
    assert student.inputs[0][0].dtype == torch.bfloat16
    assert student.inputs[0][1].dtype == torch.float32
    assert loss.dtype == torch.float32


def test_objective_held_by_a_module_keeps_the_teacher_out():
    holder = Scale()
    holder.objective = IntMeanFlow(Teacher(TeacherModule()), cache=RolloutCache(2))
    assert [name for name, _ in holder.named_parameters()] == ["weight"]
    assert list(holder.state_dict()) == ["weight"]
    twin = copy.deepcopy(holder)
    assert twin.objective is not holder.objective
    assert twin.objective.teacher is holder.objective.teacher


# -- batch ----------------------------------------------------------------------------------------


def test_batch_valid():
    valid = batch(rows=3, frames=4, lengths=[4, 1, 2]).valid()
    assert valid.dtype == torch.bool
    assert valid.sum(1).tolist() == [4, 1, 2]
    assert all(not (~row[:-1] & row[1:]).any() for row in valid)


def test_values_beyond_the_lengths_do_not_matter():
    flow = GUIDED["gaussian"]
    lengths = [5, 4, 3, 2, 1, 5]
    clean = batch(lengths=lengths)
    dirty = Batch(torch.where(clean.valid()[:, :, None], clean.x1, 1e6), clean.lengths)
    losses = []
    for material in (clean, dirty):
        student = Scale(torch.float64)
        objective = IntMeanFlow(Teacher(flow, 2.0), nfe=2, targets=2, generator=seeded())
        loss, info = objective(student, material)
        loss.backward()
        losses.append((loss.detach(), info["row_error"], student.weight.grad))
    torch.testing.assert_close(*losses)


def test_gaussian_flow_is_the_marginal_flow():
    """The closed form itself: `v(x, t)` is the mean of `x1 - x0` given `x_t = x`."""
    flow, t = Gaussian(1.5, 0.4), 0.6
    x0 = torch.randn(400_000, generator=seeded(), dtype=torch.float64)
    x1 = 1.5 + 0.4 * torch.randn(400_000, generator=seeded(1), dtype=torch.float64)
    xt = (1 - t) * x0 + t * x1
    near = (xt - 1.2).abs() < 0.02
    want = float((x1 - x0)[near].mean())
    got = flow.velocity(xt.new_full((1, 1, 1), 1.2), xt.new_full((1,), t))
    assert float(got) == pytest.approx(want, abs=0.02)


def test_one_target_keeps_only_the_ends():
    """The states between them are not needed, and not held."""
    options = {"nfe": 4, "generator": seeded()}
    few = IntMeanFlow(Teacher(FLOWS["gaussian"]), **options).rollout(batch())
    options["generator"] = seeded()
    all_ = IntMeanFlow(Teacher(FLOWS["gaussian"]), targets=2, **options).rollout(batch())
    assert len(few.states) == len(few.displacements) == 1
    assert len(all_.states) == len(all_.displacements) == 5
    for ours, theirs in zip(few.whole()[:-1], all_.whole()[:-1], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_wrapped_student_trains():
    inner = Scale(torch.float64)
    objective = IntMeanFlow(Teacher(Linear(-1.2, 0.7)), nfe=2, generator=seeded())
    loss, _ = objective(Wrapped(inner), batch())
    objective = IntMeanFlow(Teacher(Linear(-1.2, 0.7)), nfe=2, generator=seeded())
    assert torch.equal(loss, objective(inner, batch())[0])


def test_a_target_at_a_time():
    """The same loss, gradients, draws and info, without all graphs at once."""
    found = []
    for apart in (False, True):
        student, options = Small(), {"nfe": 4, "source": "noise", "targets": 3}
        made = IntMeanFlow(Teacher(FLOWS["gaussian"]), **options, generator=seeded(2))
        material = batch(channels=1, dtype=torch.float32)
        parts = [lambda s=student, m=material, o=made: o(s, m)]
        if apart:
            parts = made.by_target(student, material)
            assert len(parts) == 3
        losses, infos = [], []
        for part in parts:
            loss, info = part()
            (loss / len(parts)).backward()
            losses.append(loss.detach())
            infos.append(info)
        rows = torch.cat([info["row_error"] for info in infos])
        lengths = torch.cat([info["interval"] for info in infos])
        grads = [p.grad for p in student.parameters()]
        found.append((torch.stack(losses).mean(), rows, lengths, grads))
    torch.testing.assert_close(*found)
