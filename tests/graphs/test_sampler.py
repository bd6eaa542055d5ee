import gc
import threading
import warnings

import pytest
import torch

from imf_kernels import backend, grids, o3s
from imf_kernels.graphs import GraphSampler
from imf_kernels.models import Conditioning, DiT, TensorSpec
from imf_kernels.sampler import sample
from tests.models.tools import VARIANTS, conditions, one_row, relative_rms, small_model

BUCKETS = [(1, 24), (1, 48), (2, 48), (4, 40)]
PACKS = [(1, 24, 24), (2, 48, 48), (4, 90, 48)]


def student(variant):
    model = small_model(variant).student().eval()
    with torch.no_grad():
        model.time_embed_mixer.weight += 0.1 * torch.randn_like(model.time_embed_mixer.weight)
    return model


def noise(rows, frames, seed=0):
    return torch.randn(rows, frames, 12, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


# -- results --------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [None, 2.5])
@pytest.mark.parametrize(
    ("nfe", "buckets"), [(1, BUCKETS), (2, BUCKETS), (3, BUCKETS), (4, BUCKETS), (2, PACKS)]
)
def test_equals_the_eager_solve(either, variant, nfe, buckets, guidance):
    model = student(variant)
    sampler = GraphSampler(model, nfe, buckets, guidance)
    packed = {"packed": True} if buckets is PACKS else {}
    for seed, lengths in enumerate([[20], [48, 31], [7, 40, 33], [1]]):
        given = conditions(model, lengths, seed)
        x = noise(len(lengths), max(lengths), seed)
        cond = model.prepare(**given, guided=guidance is not None)
        want = sample(model, x, cond, "sway", nfe=nfe, guidance=guidance)
        cond = model.prepare(**given, guided=guidance is not None, **packed)
        prepared = sampler.sample(x, cond, "sway")
        inside = sampler.sample(x, grid="sway", conditions=given)
        assert relative_rms(prepared, want) <= 1e-5
        assert relative_rms(inside, want) <= 1e-5
        for row, length in enumerate(lengths):
            assert torch.equal(prepared[row, length:], x[row, length:])
    stats = sampler.stats()
    assert not stats.fallbacks
    assert (stats.hits, stats.eager) == ((8, 0) if either == "graphs" else (0, 8))


@pytest.mark.parametrize("buckets", [BUCKETS, PACKS])
def test_rows_of_their_own_lengths(either, variant, buckets):
    model = student(variant)
    sampler = GraphSampler(model, 2, buckets)
    lengths = [17, 40, 3]
    given = conditions(model, lengths)
    x = noise(3, 40)
    rows = {
        "prompt": [given["prompt"][i, : n // 3] for i, n in enumerate(lengths)],
        **({"text": [ids[ids >= 0] for ids in given["text"]]} if "text" in given else {}),
        **(
            {"mu": [m[:n] for m, n in zip(given["mu"], lengths, strict=True)]}
            if "mu" in given
            else {}
        ),
        **({"spks": list(given["spks"])} if "spks" in given else {}),
    }
    got = sampler.sample([x[i, :n] for i, n in enumerate(lengths)], conditions=rows)
    for row, length in enumerate(lengths):
        cond = model.prepare(**one_row(given, row))
        want = sample(model, x[row : row + 1, :length], cond, nfe=2)
        assert got[row].shape == (length, 12)
        assert relative_rms(got[row], want[0]) <= 1e-5


def test_replay_equals_the_eager_solve_of_the_same_bucket_bit_for_bit(taped, variant):
    model = student(variant)
    given = conditions(model, [48, 31])
    x, cond = noise(2, 48), model.prepare(**given)
    got = GraphSampler(model, 3, BUCKETS).sample(x, cond)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("imf_kernels.graphs.runtime.slot_on", lambda device: None)
        want = GraphSampler(model, 3, BUCKETS).sample(x, cond)
    assert torch.equal(got, want)


def test_odd_tensors_of_a_request(either, variant):
    """Text beyond the frames, strided noise, other dtypes, padding as upstream treats it."""
    model = student(variant)
    sampler = GraphSampler(model, 2, [(4, 64)])
    given = conditions(model, [20, 13])
    if "text" in given:
        given["text"] = torch.randint(0, 20, (2, 33))
    x = torch.randn(2, 12, 20).transpose(1, 2)
    want = sample(model, x, model.prepare(**given), nfe=2)
    assert relative_rms(sampler.sample(x, conditions=given), want) <= 1e-5
    for change in (torch.Tensor.double, torch.Tensor.int):
        other = {
            name: change(t) if t.is_floating_point() == (change is torch.Tensor.double) else t
            for name, t in given.items()
        }
        assert relative_rms(sampler.sample(x, conditions=other), want) <= 1e-5
    cond = model.prepare(**given, upstream_padding=True)
    want = sample(model, x, cond, nfe=2)
    assert relative_rms(sampler.sample(x, cond), want) <= 1e-5


@pytest.mark.parametrize("bucket", [(4, 40), (4, 160, 40)])
def test_a_request_sees_nothing_of_the_one_before(taped, variant, bucket):
    model = student(variant)
    sampler = GraphSampler(model, 2, [bucket])
    poison = conditions(model, [40, 40, 40, 40])
    for value in poison.values():
        if value.is_floating_point():
            value.fill_(torch.nan)
    assert sampler.sample(noise(4, 40) * torch.nan, conditions=poison).isnan().all()
    given = conditions(model, [9, 14])
    want = sample(model, noise(2, 14), model.prepare(**given), nfe=2)
    assert relative_rms(sampler.sample(noise(2, 14), conditions=given), want) <= 1e-5


def test_streaming_is_an_option_of_prepare(either, variant):
    model = small_model(variant, chunk=10)
    options = {"streaming": True}
    sampler = GraphSampler(model, 2, BUCKETS, 2.0, prepare=options)
    given = conditions(model, [48, 31])
    cond = model.prepare(**given, guided=True, **options)
    want = sample(model, noise(2, 48), cond, nfe=2, guidance=2.0)
    assert relative_rms(sampler.sample(noise(2, 48), cond), want) <= 1e-5
    assert relative_rms(sampler.sample(noise(2, 48), conditions=given), want) <= 1e-5
    assert not sampler.stats().fallbacks


def test_bf16_is_as_good_as_the_eager_solve(either, variant):
    exact, half = student(variant), student(variant).bfloat16()
    given = conditions(exact, [30, 22])
    truth = sample(exact, noise(2, 30), exact.prepare(**given), nfe=2)
    eager = sample(half, noise(2, 30), half.prepare(**given), nfe=2)
    got = GraphSampler(half, 2, BUCKETS).sample(noise(2, 30), conditions=given)
    assert got.dtype == torch.float32
    assert relative_rms(got, truth) <= 2 * relative_rms(eager, truth) + 1e-5


# -- schedules ------------------------------------------------------------------------------------


def test_grids_and_guidance_need_no_new_capture(taped, variant):
    model = student(variant)
    sampler = GraphSampler(model, 2, [(2, 30)], guidance=2.0)
    given = conditions(model, [30, 22])
    cond, x = model.prepare(**given, guided=True), noise(2, 30)
    sampler.warm_up()
    captures = sampler.stats().captures
    w = torch.tensor([1.5, 3.0])
    for grid in ("uniform", "sway", [0.0, 0.2, 1.0]):
        for guidance in (1.0, 4.0, w):
            want = sample(model, x, cond, grid, nfe=2, guidance=guidance)
            got = sampler.sample(x, cond, grid, guidance=guidance)
            assert relative_rms(got, want) <= 1e-5
    sampler.set_grid([0.0, 0.6, 1.0])
    want = sample(model, x, cond, [0.0, 0.6, 1.0], guidance=2.0)
    assert relative_rms(sampler.sample(x, cond), want) <= 1e-5
    stats = sampler.stats()
    assert stats.captures == captures == 3, "tables, prepare, solve"
    assert stats.grids == 4
    assert stats.hits == 10


def test_o3s_searches_on_one_graph(taped):
    model = student("cosyvoice3")
    cond = model.prepare(**conditions(model, [30]))
    x = noise(1, 30)
    fine = sample(model, x, cond, nfe=16)

    def metric(mel):
        return float((mel - fine).square().mean())

    with GraphSampler(model, 3, [(1, 32)]) as sampler:
        found = o3s.search(
            o3s.on_samples(sampler, x, cond, metric), 3, higher_is_better=False, tolerance=0.1
        )
        stats = sampler.stats()
    plain = o3s.search(
        o3s.on_samples(model, x, cond, metric), 3, higher_is_better=False, tolerance=0.1
    )
    assert torch.equal(found.grid, plain.grid)
    assert stats.captures == 3
    assert stats.hits == stats.grids == len(found.evaluations) > 5


class Recorder(torch.nn.Module):
    """A model without tables: constant velocity, and what it is asked is kept."""

    specs = {"lengths": TensorSpec(("rows",), torch.int64, pad=1)}  # noqa: RUF012
    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.channels = 3
        self.asked = []

    def prepare(self, lengths, guided=False):
        tensors = {"lengths": lengths.repeat(1 + guided)}
        return Conditioning(tensors, self.specs)

    def forward(self, x, t, r, cond):
        self.asked.append((t, r))
        return torch.ones_like(x).repeat(cond.rows // len(x), 1, 1) * self.weight


@pytest.mark.parametrize("guidance", [None, 3.0])
def test_steps_sum_to_one_and_every_row_has_its_t(either, guidance):
    model = Recorder()
    sampler = GraphSampler(model, 3, [(2, 8)], guidance)
    cond = model.prepare(torch.tensor([8, 5]), guided=guidance is not None)
    got = sampler.sample(torch.zeros(2, 8, 3), cond, [0.0, 0.1, 0.7, 1.0])
    assert got[0].flatten().tolist() == pytest.approx([1.0] * 24)
    assert not got[1, 5:].any()
    for k, (t, r) in enumerate(model.asked[-3:]):
        assert t.shape == r.shape == (2,)
        assert t.tolist() == pytest.approx([[0.0, 0.1, 0.7][k]] * 2)
        assert r.tolist() == pytest.approx([[0.1, 0.7, 1.0][k]] * 2)


# -- counters and fallbacks -----------------------------------------------------------------------


def test_stats_count_frames_and_bytes(taped):
    model = student("f5_v1")
    sampler = GraphSampler(model, 1, BUCKETS)
    cond = model.prepare(**conditions(model, [30, 20]))
    before = sampler.stats()
    sampler.sample(noise(2, 30), cond)
    stats = sampler.stats()
    assert stats.frames == 60
    assert stats.padded_frames == 2 * 48 - 60
    assert before.bytes_held == 0 < stats.bytes_held
    sampler.warm_up()
    assert sampler.stats().captures == 1 + 2 * len(BUCKETS)
    bytes_held = sampler.stats().bytes_held
    assert bytes_held == stats.bytes_held, "buckets share their buffers"


def fallbacks(sampler, call, reason):
    with pytest.warns(RuntimeWarning, match=reason):
        first = call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = call()
    assert torch.equal(first, second)
    assert sampler.stats().fallbacks == {reason.split(",")[0]: 2}
    assert sampler.stats().hits == 0
    return first


def test_what_no_bucket_holds_runs_eagerly(taped):
    model = student("f5_v0")
    sampler = GraphSampler(model, 2, BUCKETS)
    cond, x = model.prepare(**conditions(model, [49])), noise(1, 49)
    got = fallbacks(sampler, lambda: sampler.sample(x, cond), "no bucket, for 1 rows of up to 49")
    assert relative_rms(got, sample(model, x, cond, nfe=2)) <= 1e-5


def test_autocast_runs_eagerly(taped):
    model = student("f5_v0")
    sampler = GraphSampler(model, 2, BUCKETS)
    given, x = conditions(model, [40]), noise(1, 40)
    with torch.autocast("cpu", torch.bfloat16):
        got = fallbacks(sampler, lambda: sampler.sample(x, conditions=given), "autocast, without")
        want = sample(model, x, model.prepare(**given), nfe=2)
    assert relative_rms(got, want) <= 1e-2


def test_another_backend_runs_eagerly(taped):
    model = student("f5_v0")
    sampler = GraphSampler(model, 2, BUCKETS)
    cond, x = model.prepare(**conditions(model, [40])), noise(1, 40)
    with backend("reference"):
        fallbacks(sampler, lambda: sampler.sample(x, cond), "backend, 'reference'")


def test_another_conditioning_runs_eagerly(taped):
    model = student("f5_v0")
    sampler = GraphSampler(model, 2, BUCKETS)
    cond, x = model.prepare(**conditions(model, [40]), streaming=True), noise(1, 40)
    got = fallbacks(sampler, lambda: sampler.sample(x, cond), "conditioning, of")
    assert relative_rms(got, sample(model, x, cond, nfe=2)) <= 1e-5


def test_a_failed_capture_leaves_the_rest_alive(taped, monkeypatch):
    model = student("f5_v0")
    sampler = GraphSampler(model, 2, BUCKETS)
    large, small = (model.prepare(**conditions(model, [n])) for n in (40, 20))
    evaluate = type(model).evaluate

    def fails(self, x, *args):
        if x.shape[1] == 48:
            raise RuntimeError("out of luck")
        return evaluate(self, x, *args)

    monkeypatch.setattr(type(model), "evaluate", fails)
    x = noise(1, 40)
    got = fallbacks(
        sampler, lambda: sampler.sample(x, large), "capture failed, RuntimeError: out of luck"
    )
    assert relative_rms(got, sample(model, x, large, nfe=2)) <= 1e-5
    sampler.sample(noise(1, 20), small)
    assert sampler.stats().hits == 1


def test_reading_a_value_while_capturing_fails_the_capture(taped, monkeypatch):
    model = Recorder()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x, *args: forward(x, *args) * float(x.sum()))
    sampler = GraphSampler(model, 1, [(1, 8)])
    with pytest.warns(RuntimeWarning, match="a value was read"):
        sampler.sample(torch.zeros(1, 8, 3), model.prepare(torch.tensor([8])))


def test_nothing_warns_where_there_are_no_graphs():
    model = student("f5_v0")
    sampler = GraphSampler(model, 2, BUCKETS)
    cond, x = model.prepare(**conditions(model, [49])), noise(1, 49)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.warm_up()
        sampler.sample(x, cond)
    assert sampler.stats().eager == 1
    assert not sampler.stats().fallbacks


def test_may_be_first_called_in_inference_mode(either):
    model = student("f5_v1")
    sampler = GraphSampler(model, 2, BUCKETS)
    given = conditions(model, [30])
    with torch.inference_mode():
        first = sampler.sample(noise(1, 30), conditions=given)
    assert torch.equal(sampler.sample(noise(1, 30), conditions=given), first)
    sampler.sample(noise(1, 20), conditions=conditions(model, [20]))
    cond = model.prepare(**given)
    model(noise(1, 30), torch.zeros(1), torch.ones(1), cond).sum().backward()
    assert not sampler.stats().fallbacks


# -- weights --------------------------------------------------------------------------------------


def test_in_place_changes_of_what_graphs_read_are_seen(either, variant):
    model = student(variant)
    sampler = GraphSampler(model, 2, BUCKETS)
    given, x = conditions(model, [30, 22]), noise(2, 30)
    before = sampler.sample(x, conditions=given)
    with torch.no_grad():
        model.transformer_blocks[0].ff.ff[2].weight.mul_(1.5)
        model.input_embed.proj.bias.add_(0.5)
    got = sampler.sample(x, conditions=given)
    want = sample(model, x, model.prepare(**given), nfe=2)
    assert relative_rms(got, want) <= 1e-5
    assert relative_rms(before, want) > 1e-3


@pytest.mark.parametrize("which", ["adaln", "mixer", "time"])
def test_changes_behind_the_tables_are_refused_until_refreshed(either, variant, which):
    model = student(variant)
    sampler = GraphSampler(model, 2, BUCKETS)
    given, x = conditions(model, [30, 22]), noise(2, 30)
    sampler.sample(x, conditions=given)
    weight = {
        "adaln": model.transformer_blocks[1].attn_norm.linear.weight,
        "mixer": model.time_embed_mixer.weight,
        "time": model.time_embed.time_mlp[0].bias,
    }[which]
    with torch.no_grad():
        weight += 0.3
    with pytest.raises(RuntimeError, match=r"in-place change. Call refresh\(\)"):
        sampler.sample(x, conditions=given)
    sampler.refresh()
    want = sample(model, x, model.prepare(**given), nfe=2)
    assert relative_rms(sampler.sample(x, conditions=given), want) <= 1e-5


def test_uncounted_changes_are_followed_by_refresh(either):
    model = student("f5_v1")
    sampler = GraphSampler(model, 2, BUCKETS)
    given, x = conditions(model, [30]), noise(1, 30)
    sampler.sample(x, conditions=given)
    model.norm_out.linear.bias.data.add_(0.5)
    sampler.refresh()
    want = sample(model, x, model.prepare(**given), nfe=2)
    assert relative_rms(sampler.sample(x, conditions=given), want) <= 1e-5


@pytest.mark.parametrize("how", ["module", "adaLN", "cast", "replaced", "assigned", "data"])
def test_moved_weights_are_refused_until_refreshed(either, how):
    model = student("f5_v1")
    sampler = GraphSampler(model, 2, BUCKETS)
    given, x = conditions(model, [30]), noise(1, 30)
    sampler.sample(x, conditions=given)
    if how == "cast":
        model.double().float()
    elif how == "replaced":
        model.proj_out.weight = torch.nn.Parameter(model.proj_out.weight * 2)
    elif how == "module":
        model.proj_out = torch.nn.Linear(32, 12)
    elif how == "adaLN":
        layer = model.transformer_blocks[0].attn_norm.linear
        layer.weight = torch.nn.Parameter(layer.weight * 2)
    elif how == "assigned":
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    else:
        model.proj_out.weight.data = model.proj_out.weight.data * 2
    with pytest.raises(RuntimeError, match="has moved or was replaced"):
        sampler.sample(x, conditions=given)
    sampler.refresh()
    want = sample(model, x, model.prepare(**given), nfe=2)
    assert relative_rms(sampler.sample(x, conditions=given), want) <= 1e-5


def test_a_failed_capture_is_tried_again_after_refresh(taped, monkeypatch):
    model = student("f5_v1")
    sampler = GraphSampler(model, 2, BUCKETS)
    with monkeypatch.context() as patch:
        patch.setattr(model, "evaluate", None)
        with pytest.warns(RuntimeWarning, match="has no graph: capture failed"):
            sampler.warm_up()
    sampler.refresh()
    sampler.warm_up()
    given, x = conditions(model, [30]), noise(1, 30)
    sampler.sample(x, conditions=given)
    assert sampler.stats().hits == 1


def test_a_sampler_that_nobody_closed_gives_up_its_graphs(taped):
    sampler = GraphSampler(student("f5_v1"), 2, BUCKETS)
    station = sampler._engine.stations[0]
    closed = []
    station.slot.close = lambda: closed.append(True)
    del sampler
    gc.collect()
    assert closed == [True]


def test_rows_of_conditions_are_as_long_as_their_noise(either):
    model = student("cosyvoice3")
    sampler = GraphSampler(model, 2, BUCKETS)
    given = conditions(model, [40, 20])
    rows = [noise(1, 40)[0], noise(1, 20)[0]]
    mu = [given["mu"][0], given["mu"][1, :20]]
    prompt = [given["prompt"][0, :5], given["prompt"][1, :20]]
    request = {"mu": mu, "prompt": prompt, "spks": given["spks"]}
    sampler.sample(rows, conditions=request)
    with pytest.raises(ValueError, match="mu: expected 20 frames, as its noise has, got 10"):
        sampler.sample(rows, conditions={**request, "mu": [mu[0], mu[1][:10]]})
    with pytest.raises(ValueError, match="prompt: expected at most 20 frames"):
        sampler.sample(rows, conditions={**request, "prompt": [prompt[0], given["prompt"][1]]})
    with pytest.raises(ValueError, match="lengths: expected values from 1 to those of noise"):
        sampler.sample(rows, conditions={**request, "lengths": torch.tensor([40, 35])})


# -- threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 3])
def test_threads_do_not_cross(either, slots):
    model = student("cosyvoice3")
    sampler = GraphSampler(model, 2, BUCKETS, slots=slots)
    schedules = (grids.uniform(2), grids.sway(2), torch.tensor([0.0, 0.7, 1.0]))
    requests = []
    for seed, lengths in enumerate([[20], [48, 31], [7, 40, 33], [1], [24], [40, 2, 3, 4]]):
        given = conditions(model, lengths, seed)
        x = noise(len(lengths), max(lengths), seed)
        for grid in schedules:
            requests.append((x, given, grid, sample(model, x, model.prepare(**given), grid)))
    failures = []

    def serve(thread):
        torch.set_num_threads(1)
        order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(thread))
        for i in order.tolist():
            x, given, grid, want = requests[i]
            got = sampler.sample(x, grid=grid, conditions=given)
            if relative_rms(got, want) > 1e-5:
                failures.append((thread, i))

    threads = [threading.Thread(target=serve, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    stats = sampler.stats()
    assert stats.hits + stats.eager == 8 * len(requests)


# -- the door -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cond": None}, ValueError, "either cond or conditions"),
        ({"noise": torch.zeros(2, 30)}, ValueError, "noise: expected shape"),
        ({"noise": torch.zeros(2, 30, 12).double()}, TypeError, "noise: expected"),
        ({"noise": torch.zeros(3, 30, 12)}, ValueError, "cond: expected 3 prepared rows, got 2"),
        ({"noise": torch.zeros(0, 30, 12)}, ValueError, "noise: expected rows of at least one"),
        ({"noise": torch.zeros(2, 31, 12)}, ValueError, "cond's conditions: expected shape"),
        ({"noise": torch.zeros(2, 30, 11)}, ValueError, "noise: expected shape"),
        ({"noise": [torch.zeros(30, 12)]}, ValueError, "rows go with `conditions`"),
        ({"noise": torch.zeros(2, 30, 12, device="meta")}, ValueError, "noise: expected a tensor"),
        ({"noise": torch.zeros(2, 30, 12).requires_grad_()}, ValueError, "without gradient"),
        ({"grid": "none"}, ValueError, "grid: expected one of"),
        ({"grid": [0.0, 1.0]}, ValueError, "grid: expected 3 times"),
        ({"guidance": 2.0}, ValueError, "guidance: expected None"),
    ],
)
def test_errors(either, change, error, message):
    model = student("f5_v1")
    sampler = GraphSampler(model, 2, BUCKETS)
    with torch.no_grad():
        cond = model.prepare(**conditions(model, [30, 20]))
    with pytest.raises(error, match=message):
        sampler.sample(**{"noise": noise(2, 30), "cond": cond, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, "conditions: expected"),
        ({"mu": torch.zeros(2, 30, 12)}, "conditions: expected"),
        ({"prompt": torch.zeros(2, 29, 12)}, r"prompt: expected shape \(2, 30, 12\)"),
        ({"prompt": torch.zeros(2, 30, 11)}, "prompt: expected shape"),
        ({"prompt": [torch.zeros(3, 12)]}, "prompt: expected 2 rows"),
        ({"prompt": torch.zeros(2, 30, 12).long()}, "prompt: expected"),
        ({"text": torch.zeros(2, 9)}, "text: expected"),
        ({"lengths": [30, 31]}, "lengths: expected values"),
        ({"lengths": [30]}, "lengths: expected values"),
        ({"lengths": torch.tensor([30, 31])}, "lengths: expected values"),
    ],
)
def test_errors_of_conditions(either, change, message):
    model = student("f5_v1")
    sampler = GraphSampler(model, 2, BUCKETS)
    given = {**conditions(model, [30, 20]), **change}
    given = {k: v for k, v in given.items() if v is not None}
    with pytest.raises((ValueError, TypeError), match=message):
        sampler.sample(noise(2, 30), conditions=given)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"nfe": None}, ValueError, "nfe"),
        ({"nfe": 0}, ValueError, "nfe"),
        ({"buckets": []}, ValueError, "buckets"),
        ({"slots": 0}, ValueError, "slots"),
        ({"grid": [0.0, 1.0]}, ValueError, "grid"),
        ({"guidance": torch.ones(1)}, TypeError, "guidance"),
        ({"guidance": float("nan")}, ValueError, "guidance"),
        ({"prepare": {"upstream_padding": True}}, ValueError, "prepare"),
        ({"prepare": {"packed": True}}, ValueError, "prepare: expected no `packed`"),
        ({"buckets": [(1, 24), (1, 24, 24)]}, ValueError, "buckets: expected padded ones or"),
        ({"model": lambda x, t, r, cond: x}, TypeError, "model: expected a module"),
    ],
)
def test_errors_of_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        GraphSampler(**{"model": student("f5_v1"), "nfe": 2, **arguments})


def test_packed_buckets_need_a_model_that_evaluates_packed_rows():
    class Padded(DiT):
        @property
        def specs(self):
            return {name: s for name, s in super().specs.items() if name != "packed"}

    model = student("f5_v1")
    model.__class__ = Padded
    with pytest.raises(ValueError, match=r"buckets: expected \(rows, frames\), as this model"):
        GraphSampler(model, 2, PACKS)


def test_closed_is_closed(either):
    model = student("f5_v1")
    cond = model.prepare(**conditions(model, [30]))
    with GraphSampler(model, 2, BUCKETS) as sampler:
        sampler.sample(noise(1, 30), cond)
    with pytest.raises(RuntimeError, match="closed"):
        sampler.sample(noise(1, 30), cond)
    assert sampler.stats().bytes_held == 0
