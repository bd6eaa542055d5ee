import pytest
import torch

from imf_kernels import Batch, IntMeanFlow, Teacher
from imf_kernels.graphs import GraphTeacher
from tests.models.tools import VARIANTS, conditions, relative_rms, small_model

BUCKETS = [(1, 48), (2, 32), (4, 40)]
PACKS = [(2, 60, 32), (4, 90, 40)]


@pytest.fixture(params=VARIANTS)
def model(request):
    return small_model(request.param)


def interval(rows):
    return torch.linspace(0.0, 0.5, rows), torch.linspace(0.4, 1.0, rows)


@pytest.mark.parametrize("guidance", [None, 2.0, "rows"])
@pytest.mark.parametrize(("keep", "buckets"), [(False, BUCKETS), (True, BUCKETS), (False, PACKS)])
def test_rolls_out_as_the_eager_teacher(either, model, guidance, keep, buckets):
    for lengths in ([32, 20], [9, 40, 33]):
        rows, frames = len(lengths), max(lengths)
        w = torch.linspace(1.5, 3.0, rows) if guidance == "rows" else guidance
        eager, graphs = Teacher(model, w), GraphTeacher(model, w, buckets)
        given = conditions(model, lengths)
        cond, own = eager.prepare(**given), eager.prepare(**given, packed=buckets is PACKS)
        z, (t, r) = torch.randn(rows, frames, 12), interval(rows)
        for spacing in ("uniform", "sway"):
            want = eager.integrate(z, t, r, 3, cond, spacing=spacing, keep=keep)
            got = graphs.integrate(z, t, r, 3, own, spacing=spacing, keep=keep)
            for name, tensor in want._asdict().items():
                mine = getattr(got, name)
                if tensor is None:
                    assert mine is None
                else:
                    assert mine.shape == tensor.shape
                    assert relative_rms(mine, tensor) <= 1e-5
        stats = graphs.stats()
        assert not stats.fallbacks
        assert (stats.hits, stats.eager) == ((2, 0) if either == "graphs" else (0, 2))


def test_one_capture_serves_every_interval_of_a_length(taped, model):
    teacher = GraphTeacher(model, 2.0, BUCKETS)
    cond = teacher.prepare(**conditions(model, [32, 20]))
    z = torch.randn(2, 32, 12)
    for r in (0.3, 0.6, 1.0):
        teacher.integrate(z, torch.zeros(2), torch.full((2,), r), 4, cond)
    assert teacher.stats().captures == 1
    teacher.integrate(z, torch.zeros(2), torch.ones(2), 2, cond)
    assert teacher.stats().captures == 2


def test_autocast_does_not_reach_it(taped, model):
    teacher, z, results = GraphTeacher(model, 2.0, BUCKETS), torch.randn(2, 32, 12), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            cond = teacher.prepare(**conditions(model, [32, 20]))
            results.append(teacher.integrate(z, *interval(2), 2, cond).z)
    assert torch.equal(*results)
    assert (teacher.stats().hits, teacher.stats().fallbacks) == (2, {})


def test_an_objective_takes_it(either, model):
    """And packed rows, as any condition."""
    given, x1 = conditions(model, [32, 20]), torch.randn(2, 32, 12)
    lengths, results = given.pop("lengths"), []
    for kind, options, more in (
        (Teacher, {}, {}),
        (Teacher, {}, {"packed": True}),
        (GraphTeacher, {"buckets": BUCKETS}, {}),
        (GraphTeacher, {"buckets": PACKS}, {"packed": 55}),
    ):
        batch = Batch(x1, lengths, given | more)
        student = model.student()
        generator = torch.Generator().manual_seed(0)
        objective = IntMeanFlow(
            kind(model, guidance=2.0, **options), nfe=3, targets=3, generator=generator
        )
        loss, _ = objective(student, batch)
        loss.backward()
        results.append((loss, student.proj_out.weight.grad))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert relative_rms(got.detach(), want.detach()) <= 1e-4


def test_what_no_bucket_holds_runs_eagerly(taped, model):
    teacher = GraphTeacher(model, 2.0, BUCKETS)
    cond = teacher.prepare(**conditions(model, [60]))
    z, t, r = torch.randn(1, 60, 12), torch.zeros(1), torch.ones(1)
    with pytest.warns(RuntimeWarning, match="no bucket"):
        got = teacher.integrate(z, t, r, 2, cond)
    want = Teacher(model, 2.0).integrate(z, t, r, 2, cond)
    assert torch.equal(got.z, want.z)


def test_closed_is_closed(either, model):
    with GraphTeacher(model, 2.0, BUCKETS) as teacher:
        cond = teacher.prepare(**conditions(model, [20]))
    with pytest.raises(RuntimeError, match="closed"):
        teacher.integrate(torch.randn(1, 20, 12), torch.zeros(1), torch.ones(1), 2, cond)
