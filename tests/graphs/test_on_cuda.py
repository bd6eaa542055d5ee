"""Graphs on the device: what a tape on the CPU cannot show."""

import gc
import threading
import warnings

import pytest
import torch

from imf_kernels import Teacher, dispatch, grids, o3s
from imf_kernels.graphs import GraphSampler, GraphTeacher, bake, runtime
from imf_kernels.ops.ragged_copy import Copy, ragged_copy
from imf_kernels.sampler import sample
from tests.graphs.test_sampler import Recorder, noise, student
from tests.models.tools import VARIANTS, conditions, relative_rms, small_model

pytestmark = pytest.mark.gpu

BUCKETS = [(1, 96), (2, 96), (4, 64)]
PACKS = [(2, 128, 96), (4, 160, 64)]
REQUESTS = ([20], [96, 31], [7, 60, 33], [1], [64, 2, 3, 4])


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """cuDNN takes TF32 for convolutions by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    """The C++ runtime, and the one in Python for installations without it."""
    if request.param == "torch":
        monkeypatch.setattr(dispatch, "HAS_CUDA_EXTENSION", False)
    elif not dispatch.HAS_CUDA_EXTENSION:
        pytest.skip("the extension is built without CUDA")
    return request.param


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def on_cuda(given):
    return {name: value.cuda() for name, value in given.items()}


def request_of(model, lengths, seed=0):
    given = on_cuda(conditions(model, lengths, seed))
    return noise(len(lengths), max(lengths), seed).cuda(), given


@pytest.mark.parametrize("guidance", [None, 2.5])
@pytest.mark.parametrize(
    ("nfe", "buckets"), [(1, BUCKETS), (2, BUCKETS), (3, BUCKETS), (4, BUCKETS), (3, PACKS)]
)
def test_equals_the_unpadded_eager_solve(path, variant, nfe, buckets, guidance):
    model = student(variant).cuda()
    packed = {"packed": True} if buckets is PACKS else {}
    with GraphSampler(model, nfe, buckets, guidance) as sampler:
        for seed, lengths in enumerate(REQUESTS):
            x, given = request_of(model, lengths, seed)
            cond = model.prepare(**given, guided=guidance is not None)
            want = sample(model, x, cond, "sway", nfe=nfe, guidance=guidance)
            cond = model.prepare(**given, guided=guidance is not None, **packed)
            assert relative_rms(sampler.sample(x, cond, "sway"), want) <= 1e-5
            assert relative_rms(sampler.sample(x, grid="sway", conditions=given), want) <= 1e-5
        stats = sampler.stats()
    assert stats.hits == 2 * len(REQUESTS)
    assert not stats.fallbacks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nfe", [1, 2, 3, 4])
def test_equals_the_eager_solve_of_the_bucket_bit_for_bit(path, variant, nfe, dtype, monkeypatch):
    model = student(variant).cuda().to(dtype)
    x, given = request_of(model, [96, 31])
    cond = model.prepare(**given)
    with GraphSampler(model, nfe, BUCKETS) as sampler:
        got = sampler.sample(x, cond)
        assert sampler.stats().hits == 1
    monkeypatch.setattr(runtime, "slot_on", lambda device: None)
    assert torch.equal(got, GraphSampler(model, nfe, BUCKETS).sample(x, cond))


@pytest.mark.parametrize("nfe", [1, 2, 3, 4])
def test_bf16_is_as_good_as_the_eager_solve(path, variant, nfe):
    exact, half = student(variant).cuda(), student(variant).cuda().bfloat16()
    for seed, lengths in enumerate(REQUESTS):
        x, given = request_of(exact, lengths, seed)
        truth = sample(exact, x, exact.prepare(**given), nfe=nfe)
        eager = sample(half, x, half.prepare(**given), nfe=nfe)
        with GraphSampler(half, nfe, BUCKETS) as sampler:
            got = sampler.sample(x, conditions=given)
        assert relative_rms(got, truth) <= 2 * relative_rms(eager, truth) + 1e-5


def test_grids_guidance_and_lengths_need_no_new_capture(path, variant):
    model = student(variant).cuda()
    with GraphSampler(model, 2, [(2, 96)], guidance=2.0) as sampler:
        sampler.warm_up()
        for seed, grid in enumerate(("uniform", "sway", grids.uniform(2).cuda(), [0.0, 0.2, 1.0])):
            for w in (1.0, 4.0, torch.tensor([1.5, 3.0], device="cuda")):
                x, given = request_of(model, [96 - 20 * seed, 31], seed)
                cond = model.prepare(**given, guided=True)
                want = sample(model, x, cond, grid, nfe=2, guidance=w)
                assert relative_rms(sampler.sample(x, cond, grid, guidance=w), want) <= 1e-5
        assert sampler.stats().captures == 3


def test_a_replay_never_waits_for_the_device(path):
    model = student("f5_v1").cuda()
    with GraphSampler(model, 2, BUCKETS) as sampler:
        sampler.warm_up()
        x, given = request_of(model, [60])
        torch.cuda.set_sync_debug_mode("error")
        try:
            sampler.sample(x, conditions=given)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("guidance", [None, 3.0])
def test_steps_sum_to_one_and_every_row_has_its_t(path, guidance):
    model = Recorder().cuda()
    with GraphSampler(model, 3, [(2, 8)], guidance) as sampler:
        cond = model.prepare(torch.tensor([8, 5], device="cuda"), guided=guidance is not None)
        got = sampler.sample(torch.zeros(2, 8, 3, device="cuda"), cond, [0.0, 0.1, 0.7, 1.0])
        torch.testing.assert_close(got[0], torch.ones_like(got[0]), rtol=1e-6, atol=1e-6)
        assert not got[1, 5:].any()
        for k, (t, r) in enumerate(model.asked[-3:]):  # the static buffers of the capture
            assert t.tolist() == pytest.approx([[0.0, 0.1, 0.7][k]] * 2)
            assert r.tolist() == pytest.approx([[0.1, 0.7, 1.0][k]] * 2)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("slots", [1, 3])
def test_eight_threads_of_mixed_requests_do_not_cross(path, slots):
    model = student("cosyvoice3").cuda()
    cases = []
    for seed, lengths in enumerate((*REQUESTS, [97])):  # the last one has no bucket
        x, given = request_of(model, lengths, seed)
        for grid in (grids.uniform(2), grids.sway(2), torch.tensor([0.0, 0.7, 1.0])):
            cases.append((x, given, grid, sample(model, x, model.prepare(**given), grid)))
    torch.cuda.synchronize()
    failures = []
    with GraphSampler(model, 2, BUCKETS, slots=slots) as sampler:

        def serve(thread):
            order = torch.randint(
                len(cases), (200,), generator=torch.Generator().manual_seed(thread)
            )
            with torch.cuda.stream(torch.cuda.Stream()):
                for i in order.tolist():
                    x, given, grid, want = cases[i]
                    got = sampler.sample(x, grid=grid, conditions=given)
                    if relative_rms(got, want) > 1e-5:
                        failures.append((thread, i))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            threads = [threading.Thread(target=serve, args=(n,)) for n in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        stats = sampler.stats()
    assert not failures
    assert stats.hits + sum(stats.fallbacks.values()) == 1600


def alive():
    """What must work after a failed capture: allocations of both kinds, random numbers."""
    torch.empty(1 << 20, device="cuda").fill_(1.0)
    torch.empty(1 << 20, pin_memory=True).fill_(1.0)
    assert torch.randn(100, device="cuda").std() > 0
    torch.cuda.synchronize()


class TestAbort:
    @pytest.fixture
    def slot(self, path):
        slot = runtime.slot_on(torch.device("cuda", torch.cuda.current_device()))
        yield slot
        slot.close()

    @pytest.mark.parametrize("failure", ["python", "sync", "pinned"])
    def test_unwinds(self, slot, failure):
        runs = []

        def fails():
            x = torch.randn(1 << 16, device="cuda") * 2
            runs.append(None)
            if len(runs) <= runtime.WARM_UPS:
                return
            if failure == "python":
                raise ValueError("the model's own")
            if failure == "pinned":
                torch.empty(1 << 16, pin_memory=True).copy_(x, non_blocking=True)
            float(x.sum())  # illegal while capturing

        expected = ValueError if failure == "python" else RuntimeError
        with pytest.raises(expected):
            slot.capture(fails)
        alive()
        assert not torch.cuda.is_current_stream_capturing()

        static = torch.ones(8, device="cuda")
        graph = slot.capture(lambda: static.mul_(2))  # a later capture in the same slot works
        static.fill_(1.0)
        slot.replay([], [graph], [])
        assert static.tolist() == [2.0] * 8
        alive()

    def test_holds_no_memory(self, slot):
        gc.collect()
        slot.capture(lambda: torch.ones(8, device="cuda"))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before, held = torch.cuda.memory_allocated(), slot.bytes_held()
        for _ in range(5):
            runs = []

            def fails(runs=runs):
                x = torch.randn(1 << 24, device="cuda")
                runs.append(None)
                if len(runs) > runtime.WARM_UPS:
                    float(x.sum())

            with pytest.raises(RuntimeError):
                slot.capture(fails)
        gc.collect()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_allocated() <= before
        assert slot.bytes_held() <= held + (1 << 27), "at most what one attempt has cached"

    def test_serving_goes_on_eagerly(self, path, monkeypatch):
        model = student("f5_v0").cuda()
        evaluate = type(model).evaluate

        def fails(self, x, *args):
            v = evaluate(self, x, *args)
            if torch.cuda.is_current_stream_capturing() and x.shape[1] == 96:
                float(v.sum())
            return v

        monkeypatch.setattr(type(model), "evaluate", fails)
        with GraphSampler(model, 2, BUCKETS) as sampler:
            x, given = request_of(model, [90])
            with pytest.warns(RuntimeWarning, match="capture failed"):
                got = sampler.sample(x, conditions=given)
            want = sample(model, x, model.prepare(**given), nfe=2)
            assert relative_rms(got, want) <= 1e-5
            x, given = request_of(model, [20, 64, 3])
            want = sample(model, x, model.prepare(**given), nfe=2)
            assert relative_rms(sampler.sample(x, conditions=given), want) <= 1e-5
            assert sampler.stats().hits == 1
        alive()


@pytest.mark.parametrize("how", ["assigned", "cast"])
def test_graphs_come_back_after_weights_have_moved(path, how):
    model = student("f5_v1").cuda()
    with GraphSampler(model, 2, BUCKETS) as sampler:
        x, given = request_of(model, [90])
        sampler.sample(x, conditions=given)
        if how == "cast":
            model.double().float()
        else:
            state = {k: 2 * v for k, v in model.state_dict().items()}
            model.load_state_dict(state, assign=True)
        sampler.refresh()
        want = sample(model, x, model.prepare(**given), nfe=2)
        assert relative_rms(sampler.sample(x, conditions=given), want) <= 1e-5
        stats = sampler.stats()
        assert stats.hits == 2
        assert not stats.fallbacks


def test_slots_have_streams_of_their_own(path):
    slots = [runtime.slot_on(torch.device("cuda", 0)) for _ in range(8)]
    ours = {slot.stream.stream_id for slot in slots}
    assert len(ours) == 8
    others = {torch.cuda.Stream().stream_id for _ in range(40)}
    assert not ours & others
    for slot in slots:
        slot.close()


def test_thirty_two_buckets_share_one_pool(path, capsys):
    model = student("f5_v1").cuda()
    buckets = [(rows, frames) for rows in (1, 2, 4, 8) for frames in range(64, 576, 64)]
    assert len(buckets) == 32
    with GraphSampler(model, 2, [max(buckets)]) as alone:
        alone.warm_up()
        largest = alone.stats().bytes_held
    with GraphSampler(model, 2, buckets) as sampler:
        sampler.warm_up()
        stats = sampler.stats()
    assert stats.captures == 1 + 2 * 32
    with capsys.disabled():
        print(
            f"\n32 buckets: {stats.bytes_held / 2**20:.1f} MiB, the largest alone "
            f"{largest / 2**20:.1f} MiB"
        )
    assert stats.bytes_held <= 3 * largest


def test_o3s_searches_on_one_graph(path):
    model = student("f5_v0").cuda()
    x, given = request_of(model, [60, 44])
    cond = model.prepare(**given)
    fine = sample(model, x, cond, nfe=16)

    def metric(mel):
        return float((mel - fine).square().mean())

    with GraphSampler(model, 3, BUCKETS) as sampler:
        metric_of = o3s.on_samples(sampler, x, cond, metric)
        found = o3s.search(metric_of, 3, higher_is_better=False, tolerance=0.1)
        stats = sampler.stats()
    assert stats.captures == 3
    assert stats.hits == len(found.evaluations)


def test_teacher_rolls_out_as_the_eager_one(path, variant):
    model = small_model(variant).cuda()
    eager = Teacher(model, 2.0)
    x, given = request_of(model, [96, 60])
    cond = eager.prepare(**given)
    t, r = torch.tensor([0.0, 0.3]).cuda(), torch.tensor([0.6, 1.0]).cuda()
    with GraphTeacher(model, 2.0, BUCKETS) as graphs:
        for keep in (False, True):
            want = eager.integrate(x, t, r, 4, cond, keep=keep)
            got = graphs.integrate(x, t, r, 4, cond, keep=keep)
            assert relative_rms(got.displacement, want.displacement) <= 1e-5
            if keep:
                assert relative_rms(got.states, want.states) <= 1e-5
        assert graphs.stats().hits == 2


def test_baked_students_serve(path, variant):
    model = student(variant).cuda()
    x, given = request_of(model, [60, 44])
    with bake(model, ["uniform", "sway"], 2, buckets=BUCKETS) as sampler:
        for grid in ("uniform", "sway", "uniform"):
            want = sample(model, x, model.prepare(**given), grid, nfe=2)
            assert relative_rms(sampler.sample(x, grid=grid, conditions=given), want) <= 1e-5


def test_a_stream_that_captures_is_refused(path):
    model = student("f5_v1").cuda()
    x, given = request_of(model, [60])
    with GraphSampler(model, 2, BUCKETS) as sampler:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.add(1)
            with pytest.raises(RuntimeError, match="expected no capture under way"):
                sampler.sample(x, conditions=given)
        sampler.sample(x, conditions=given)
        assert sampler.stats().hits == 1


def test_other_tensors_than_cuda_ones_are_refused(path):
    model = student("f5_v1").cuda()
    with GraphSampler(model, 2, BUCKETS) as sampler:
        x, given = request_of(model, [60])
        with pytest.raises(ValueError, match="noise: expected a tensor on cuda:0, got one on cpu"):
            sampler.sample(x.cpu(), conditions=given)


def test_bf16_tables_are_as_good_as_the_weights():
    model = student("f5_v1").cuda().bfloat16()
    grid = grids.uniform(3).cuda()
    got = model.tables(grid[:-1], grid[1:])
    exact = model.float().tables(grid[:-1], grid[1:])
    assert relative_rms(got.blocks, exact.blocks) <= 1e-4


def test_ragged_copy_of_many_rows_is_one_order_with_the_stream():
    rows = [torch.randn(n % 50 + 1, 12, device="cuda") for n in range(500)]
    buffer = torch.empty(500, 40, 12, device="cuda")
    ragged_copy(Copy(buffer[i], row) for i, row in enumerate(rows))
    for i, row in enumerate(rows):
        assert torch.equal(buffer[i, : len(row)], row[:40])
