"""Students whose `prepare` is told the guidance: an embedding of w among the frames' conditions."""

import pytest
import torch
from torch import nn

from imf_kernels import sampler
from imf_kernels.graphs import GraphSampler, bake
from imf_kernels.hosts import cosyvoice
from imf_kernels.models import CausalUNet, DiT, load_student, save_student
from imf_kernels.streaming import Streams
from tests.graphs.tape import TapeSlot
from tests.models.test_cosyvoice2 import small_unet
from tests.models.tools import conditions, one_row, relative_rms, small_model

FAMILIES = ("unet", "f5_v1", "cosyvoice3")
LENGTHS = [9, 6]
W = torch.tensor([1.5, 3.0])


def teacher(family, **switches):
    if family == "unet":
        return small_unet(mid_blocks=1, depth=1, **switches)
    return small_model(family, **switches)


def trained(family, **switches):
    """A student whose w moves it."""
    student = teacher(family, **switches).student(guidance=True).eval()
    with torch.no_grad():
        for parameter in student.guidance_embed.mlp[2].parameters():
            parameter.normal_(std=0.2)
    return student.requires_grad_(False)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def noise(frames=9, rows=2):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, frames, 12, generator=generator)


@torch.no_grad()
def velocity(model, given, **options):
    return evaluated(model, given, **options)


def evaluated(model, given, **options):
    x = noise(given["prompt"].shape[1], len(given["prompt"]))
    t = torch.full((len(x),), 0.3)
    return model(x, t, t + 0.5, model.prepare(**given, **options))


def test_untrained_it_is_the_plain_student_for_every_w(family):
    model = teacher(family)
    plain, told = model.student().eval(), model.student(guidance=True).eval()
    given = conditions(model, LENGTHS)
    for options in ({}, {"guided": True}, {"packed": True}, {"streaming": True}):
        want = velocity(plain, given, **options)
        for w in (1.0, -3, W, W.double()):
            assert torch.equal(velocity(told, given, guidance=w, **options), want)


def test_a_batch_equals_its_rows_however_they_lie(family):
    model = trained(family)
    given = conditions(model, LENGTHS)
    want = velocity(model, given, guidance=W)
    moved = velocity(model, given, guidance=W.flip(0))
    assert relative_rms(moved, want) > 0.01
    torch.testing.assert_close(velocity(model, given, guidance=W, packed=True), want)
    both = velocity(model, given, guidance=W, guided=True)
    torch.testing.assert_close(both[:2], want)
    other = velocity(model, given, guidance=W.flip(0), guided=True)
    assert relative_rms(other[2:], both[2:]) > 0.01
    for row, length in enumerate(LENGTHS):
        alone = one_row(given, row)
        t = torch.tensor([0.3])
        cond = model.prepare(**alone, guidance=float(W[row]))
        got = model(noise()[row : row + 1, :length], t, t + 0.5, cond)
        torch.testing.assert_close(got[0], want[row, :length], rtol=1e-4, atol=1e-5)


def test_the_embedding_is_float32_under_autocast_and_in_half_precision(family):
    model = trained(family)
    want = model.guidance_embed(W)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.guidance_embed(W), want)
    rounded = trained(family).bfloat16().guidance_embed
    got = rounded(W)
    assert got.dtype == torch.float32
    assert torch.equal(got, rounded.float()(W))


def test_gradients_reach_the_embedding(family):
    model = teacher(family).student(guidance=True)
    evaluated(model, conditions(model, LENGTHS), guidance=W).square().mean().backward()
    for parameter in model.guidance_embed.mlp[2].parameters():
        assert parameter.grad.abs().max() > 0


def test_refusals(family):
    plain, told = teacher(family).student(), trained(family)
    given = conditions(plain, LENGTHS)
    with pytest.raises(ValueError, match="guidance: expected None for a model that is not told it"):
        plain.prepare(**given, guidance=2.0)
    for w in (None, "2", float("nan"), True):
        with pytest.raises(ValueError, match="guidance: expected a finite number or a tensor"):
            told.prepare(**given, guidance=w)
    with pytest.raises(ValueError, match="guidance: expected shape"):
        told.prepare(**given, guidance=W[:1])
    with pytest.raises(TypeError, match=r"guidance: expected torch\.float32"):
        told.prepare(**given, guidance=W.long())


def test_a_student_of_such_a_student_and_half_a_state_dict(family):
    model = trained(family)
    again = model.student().eval()
    assert again.config.guidance
    given = conditions(model, LENGTHS)
    assert torch.equal(
        velocity(again, given, guidance=W), velocity(model.student().eval(), given, guidance=W)
    )
    assert torch.equal(again.guidance_embed.mlp[2].weight, model.guidance_embed.mlp[2].weight)
    again.load_state_dict(teacher(family).state_dict())  # a teacher's: nothing learnt of w
    assert not again.guidance_embed.mlp[2].weight.any()
    state = model.state_dict()
    del state["guidance_embed.mlp.0.bias"]
    with pytest.raises(RuntimeError, match=r"guidance_embed\.mlp\.0\.bias"):
        again.load_state_dict(state)


# -- files ----------------------------------------------------------------------------------------


def test_sizes_are_found_in_the_keys(family):
    model = trained(family)
    state = {f"some.prefix.{k}": v for k, v in model.state_dict().items()}
    sizes = {"heads": model.config.heads}
    loaded = (
        CausalUNet.from_state_dict(state, **sizes)
        if family == "unet"
        else DiT.from_state_dict(state, family, **sizes)
    ).eval()
    assert loaded.config.guidance
    given = conditions(model, LENGTHS)
    assert torch.equal(velocity(loaded, given, guidance=W), velocity(model, given, guidance=W))
    del state["some.prefix.guidance_embed.mlp.2.bias"]
    with pytest.raises(ValueError, match=r"missing 1 .*guidance_embed.mlp.2.bias"):
        type(model).from_state_dict(state, *([] if family == "unet" else [family]), **sizes)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_saved_and_loaded(tmp_path, family, suffix):
    model, path = trained(family), tmp_path / f"student{suffix}"
    save_student(teacher(family).student(), path)  # to be replaced
    save_student(model, path, grid="uniform", nfe=2)
    student = load_student(path)
    given = conditions(model, LENGTHS)
    want = velocity(model, given, guidance=W)
    assert torch.equal(velocity(student.model, given, guidance=W), want)
    if suffix == ".pt":  # among a teacher's other weights
        prefix = "ema_model.transformer." if family.startswith("f5") else "decoder.estimator."
        flow = {prefix + k: v for k, v in teacher(family).state_dict().items()}
        torch.save(flow | {"other": torch.ones(2)}, tmp_path / "flow.pt")
        save_student(model, path, like=tmp_path / "flow.pt")
        written = torch.load(path, weights_only=True)
        written = written.get("ema_model_state_dict", written)
        assert written.keys() == {*flow, "other"}
        assert torch.equal(velocity(load_student(path).model, given, guidance=W), want)


# -- served ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("buckets", [[(4, 16)], [(4, 40, 16)]])
def test_through_graphs(monkeypatch, family, buckets):
    monkeypatch.setattr("imf_kernels.graphs.runtime.slot_on", TapeSlot)
    model = trained(family)
    service = GraphSampler(model, 2, buckets)
    given = conditions(model, LENGTHS)
    for w in (W, W.flip(0)):
        cond = model.prepare(**given, guidance=w)
        want = sampler.sample(model, noise(), cond, nfe=2)
        packed = {"packed": True} if len(buckets[0]) == 3 else {}
        cond = model.prepare(**given, guidance=w, **packed)
        assert relative_rms(service.sample(noise(), cond), want) <= 1e-5
        for told in (w, w.tolist(), [round(v) if v == 3 else v for v in w.tolist()]):
            got = service.sample(noise(), conditions=given | {"guidance": told})
            assert relative_rms(got, want) <= 1e-5
    first = model.prepare(**given, guidance=1.5)
    want = sampler.sample(model, noise(), first, nfe=2)
    got = service.sample(noise(), conditions=given | {"guidance": 1.5})
    assert relative_rms(got, want) <= 1e-5
    stats = service.stats()
    assert not stats.fallbacks
    assert stats.hits == 9
    with pytest.raises(ValueError, match=r"conditions: expected .*guidance"):
        service.sample(noise(), conditions=given)


def test_without_cuda(family):
    model = trained(family)
    given = conditions(model, LENGTHS) | {"guidance": W}
    want = sampler.sample(model, noise(), model.prepare(**given), nfe=2)
    service = GraphSampler(model, 2, [(4, 16)])
    for told in (W, W.tolist()):
        assert torch.equal(service.sample(noise(), conditions=given | {"guidance": told}), want)


def test_baked():
    model = trained("f5_v1")
    given = conditions(model, LENGTHS) | {"guidance": W}
    want = sampler.sample(model, noise(), model.prepare(**given), "sway", nfe=2)
    baked = bake(model, ["sway"], 2, buckets=[(4, 16)])
    assert relative_rms(baked.sample(noise(), conditions=given), want) <= 1e-5


@pytest.mark.parametrize("family", ["unet", "cosyvoice3"])
def test_streamed(family):
    model = trained(family, chunk=5)
    given = conditions(model, [17, 13])
    cond = model.prepare(**given, guidance=W, streaming=True)
    want = sampler.sample(model, noise(17), cond, nfe=2)
    pool = Streams(model, nfe=2, frames=40, streams=2)
    for row, frames in enumerate((17, 13)):
        prompt = given["prompt"][row, : frames // 3]
        said = {"spks": given["spks"][row], "noise": noise(17)[row, :frames], "prompt": prompt}
        with pytest.raises(ValueError, match="guidance: expected a finite number"):
            pool.open(frames, **said)
        with pool.open(frames, **said, guidance=float(W[row])) as stream:
            stream.feed(given["mu"][row, :frames])
            stream.finish()
            got = stream.drain()
        assert relative_rms(got, want[row, frames // 3 : frames]) <= 1e-5


@pytest.mark.parametrize("family", ["unet", "cosyvoice3"])
def test_cosyvoices_rate_is_what_its_student_is_told(family):
    model = trained(family)
    given = conditions(model, [9, 9])
    mask = torch.ones(2, 1, 9)
    said = {"spks": given["spks"], "cond": given["prompt"].mT, "noise": noise().mT}
    cfm = cosyvoice.CFM(model, grid="uniform", nfe=2, inference_cfg_rate=0.5, returns="tensor")
    want = sampler.sample(model, noise(), model.prepare(**given, guidance=1.5), nfe=2).mT
    torch.testing.assert_close(cfm(given["mu"].mT, mask, **said), want)
    cfm.capture(buckets=[(2, 16)])
    torch.testing.assert_close(cfm(given["mu"].mT, mask, **said), want)

    t = torch.zeros(2)
    x = noise().mT
    arguments = (x, mask, given["mu"].mT, t, given["spks"], given["prompt"].mT)
    told = cosyvoice.Estimator(model, guidance=1.5)
    v = model(noise(), t, t, model.prepare(**given, guidance=1.5)).mT
    torch.testing.assert_close(told(*arguments), v)
    with pytest.raises(ValueError, match="guidance: expected a finite number"):
        cosyvoice.Estimator(model)(*arguments)
    baked = cosyvoice.BakedEstimator(model, "uniform", 2, doubled=False, guidance=1.5)
    u = model(noise(), t, t + 0.5, model.prepare(**given, guidance=1.5)).mT
    torch.testing.assert_close(baked(*arguments), u, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="guidance: expected a finite number"):
        cosyvoice.BakedEstimator(model, "uniform", 2)


def test_f5s_strength_is_what_its_student_is_told():
    from imf_kernels.hosts.f5_tts import F5TTS

    model = trained("f5_v1")
    host = F5TTS(model, nfe=2)
    text = torch.randint(0, 20, (1, 4))
    samples = []
    for strength in (0.0, 2.0):
        mel, _ = host.sample(noise(rows=1), text, 16, cfg_strength=strength, seed=0)
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(1, 16, 12, generator=generator)
        prompt = nn.functional.pad(noise(rows=1), (0, 0, 0, 7))
        cond = model.prepare(prompt, text=text, guidance=1 + strength)
        want = sampler.sample(model, start, cond, nfe=2)
        torch.testing.assert_close(mel[:, 9:], want[:, 9:])
        samples.append(mel)
    assert relative_rms(*samples) > 0.01
