"""F5-TTS's host by itself: its client's numbers, and its client's faults that it must not have."""

import copy
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import nan

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from imf_kernels import IntMeanFlow, SplitMeanFlow, Teacher, grids, sampler
from imf_kernels.data import Mel
from imf_kernels.hosts.f5_tts import (
    F5TTS,
    from_checkpoint,
    from_host,
    from_student,
    restore,
)
from imf_kernels.models import DiT, DiTConfig, TextConfig, save_student
from tests.models.tools import golden, relative_rms, small_model

GOLDEN = [("f5_base_b1", "f5_v0"), ("f5_v1_b1", "f5_v1")]
GOLDEN_SEED = 42  # of their noise
CHANNELS = 12


@pytest.fixture(params=["f5_v0", "f5_v1"])
def variant(request):
    return request.param


def host(variant="f5_v1", **options):
    return F5TTS(small_model(variant), **options).eval()


def request(frames=30, prompt=9, tokens=11, seed=0):
    """Arguments of `sample` for one row."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "cond": torch.randn(1, prompt, CHANNELS, generator=generator),
        "text": torch.randint(20, (1, tokens), generator=generator),
        "duration": frames,
    }


def batch(*requests):
    """The rows of some requests, padded as a client would."""
    rows, longest = (
        [one["cond"][0] for one in requests],
        max(one["text"].shape[1] for one in requests),
    )
    text = torch.full((len(rows), longest), -1)
    for row, one in zip(text, requests, strict=True):
        row[: one["text"].shape[1]] = one["text"][0]
    return {
        "cond": nn.utils.rnn.pad_sequence(rows, batch_first=True),
        "text": text,
        "duration": torch.tensor([one["duration"] for one in requests]),
        "lens": torch.tensor([len(row) for row in rows]),
    }


def counted(module, name, monkeypatch):
    """The arguments of every call of a module's method."""
    calls, method = [], getattr(module, name)

    def spy(*args, **kwargs):
        calls.append(args)
        return method(*args, **kwargs)

    monkeypatch.setattr(module, name, spy)
    return calls


# -- the client's numbers -----------------------------------------------------------------------


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize(("name", "variant"), GOLDEN)
def test_sample_is_the_clients(name, variant, guided):
    tensors, metadata, state = golden(name)
    sampled, states = F5TTS(DiT.from_state_dict(state, variant)).sample(
        tensors["cond"],
        tensors["text"],
        tensors["duration"],
        lens=tensors["lens"],
        steps=int(metadata["steps"]),
        cfg_strength=float(metadata["cfg_strength"]) if guided else 0.0,
        sway_sampling_coef=float(metadata["sway"]),
        seed=GOLDEN_SEED,
    )
    expected = tensors["sample_cfg2" if guided else "sample_nocfg"]
    torch.testing.assert_close(sampled, expected, rtol=0, atol=1e-4)
    assert states.shape == (1, *expected.shape)
    prompt = tensors["cond"].shape[1]
    assert torch.equal(states[-1][:, prompt:], sampled[:, prompt:])


def test_all_states_when_asked_for():
    model = host()
    sampled, states = model.sample(**request(), steps=4, seed=3, trajectory=True)
    assert states.shape == (5, *sampled.shape)
    assert torch.equal(states[0, 0], torch.randn(30, CHANNELS, generator=seeded(3)))
    assert torch.equal(states[-1:], model.sample(**request(), steps=4, seed=3)[1])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# -- the client's faults ------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_the_text_tower_runs_once(monkeypatch, strength):
    model = host()
    calls = counted(model.transformer.text_embed, "forward", monkeypatch)
    model.sample(**request(), steps=5, cfg_strength=strength)
    assert len(calls) == 1


@pytest.mark.parametrize("steps", [16, 32, 64])
def test_in_bfloat16_the_steps_add_up_to_one(steps):
    """The client crashes here, and at others its first step is 19 % off."""
    model = host()
    nn.init.zeros_(model.transformer.proj_out.weight)
    nn.init.ones_(model.transformer.proj_out.bias)  # a velocity of 1 moves by the sum of the steps
    model.to(torch.bfloat16)
    given = {"steps": steps, "cfg_strength": 2.0, "sway_sampling_coef": -1.0}
    out, states = model.sample(**request(), **given, seed=0, trajectory=True)
    assert out.dtype == torch.float32
    torch.testing.assert_close(states[-1] - states[0], torch.ones_like(out), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_stays_near_float32(variant, dtype, bound):
    model = host(variant)
    given = {"steps": 16, "cfg_strength": 2.0, "sway_sampling_coef": -1.0, "seed": 1}
    expected, _ = model.sample(**request(), **given)
    with torch.inference_mode(), torch.autocast("cpu", dtype):
        out, _ = model.sample(**request(), **given)
    assert out.dtype == torch.float32
    assert 0 < relative_rms(out, expected) <= bound
    assert 0 < relative_rms(model.to(dtype).sample(**request(), **given)[0], expected) <= bound


def test_trains_after_sampling_in_inference_mode():
    model = host()
    with torch.inference_mode():
        model.sample(**request(), steps=1)
        again = from_host(model, share=False)
        again.sample(**request(), steps=1)
    again.load_state_dict(model.state_dict())
    for one in (model, again):
        one(**mels())[0].backward()
        assert all(p.grad is not None for p in one.parameters())


def test_threads_answer_as_one():
    model, rows = host(), [request(30, seed=1), request(41, seed=2)] * 2
    given = {"steps": 4, "cfg_strength": 2.0, "seed": 0}
    expected = [copy.deepcopy(model).sample(**row, **given)[0] for row in rows]
    with ThreadPoolExecutor(2) as pool:
        answers = pool.map(lambda row: model.sample(**row, **given)[0], rows)
        assert all(map(torch.equal, answers, expected))


def test_every_guided_row_has_its_time(monkeypatch):
    model = host()
    live = counted(model.transformer, "modulation", monkeypatch)
    model.sample(**batch(request(), request(22)), steps=2, cfg_strength=2.0, grad=True)
    assert [(t.shape, r.shape) for t, r in live] == [((4,), (4,))] * 2
    assert torch.equal(torch.stack([t for t, _ in live]), torch.tensor([[0.0] * 4, [0.5] * 4]))


def test_a_seed_leaves_the_random_state_alone():
    model = host()
    before = torch.get_rng_state(), random.getstate()
    seeded, _ = model.sample(**request(), steps=2, seed=7)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    torch.manual_seed(7)
    assert torch.equal(model.sample(**request(), steps=2)[0], seeded)
    assert not torch.equal(torch.get_rng_state(), before[0])


@pytest.mark.parametrize(
    "options",
    [{"cfg_strength": 0.0}, {"cfg_strength": 2.0}, {"duplicate_test": True, "t_inter": 0.5}],
)
def test_a_batch_equals_its_rows(variant, options):
    model = host(variant)
    rows = [request(33, 9, 11, 1), request(17, 9, 14, 2), request(47, 13, 5, 3)]
    given = {"steps": 4, **options}
    together, _ = model.sample(**batch(*rows), **given, seed=[5, 6, 7])
    padded = F5TTS(model.transformer, upstream_padding=True)
    theirs, _ = padded.sample(**batch(*rows), **given, seed=[5, 6, 7])
    for i, row in enumerate(rows):
        alone, _ = model.sample(**row, **given, seed=5 + i)
        frames = row["duration"]
        assert relative_rms(together[i, :frames], alone[0]) <= 1e-5
        assert not together[i, frames:].any()
        assert (relative_rms(theirs[i, :frames], alone[0]) > 1e-3) == (frames < 47)


def test_one_seed_starts_every_row():
    _, states = host().sample(
        **batch(request(30), request(30)), steps=1, seed=4, trajectory=True, cfg_strength=0
    )
    assert torch.equal(states[0, 0], states[0, 1])


def test_angles_of_3000_frames_in_bfloat16():
    model = host().to(torch.bfloat16)
    rope = model.transformer.prepare(torch.zeros(1, 3000, CHANNELS), text=torch.zeros(1, 1).long())
    half = model.transformer.config.head_dim // 2
    frequencies = 1 / 1e4 ** (torch.arange(half, dtype=torch.float32) / half)  # the checkpoints'
    angles = torch.outer(torch.arange(3000, dtype=torch.float64), frequencies.double())
    expected = torch.cat([angles.cos(), angles.sin()], dim=-1)
    torch.testing.assert_close(rope["rope"].double(), expected, rtol=0, atol=1e-6)


def test_the_clients_files_load_strictly(variant):
    """As its `load_checkpoint` does: the averaged model's prefix off, and a strict load."""
    model = host(variant)
    saved = {f"ema_model.{name}": value for name, value in model.state_dict().items()}
    assert all(name.startswith("ema_model.transformer.") for name in saved)
    state = {name.replace("ema_model.", ""): value for name, value in saved.items()}
    for fresh in (F5TTS(DiT(model.transformer.config)), host(variant).student()):
        fresh.load_state_dict(state)
        given = request() | {"steps": 2, "cfg_strength": 0.0, "seed": 0}
        assert torch.equal(fresh.sample(**given)[0], model.sample(**given)[0])
    state.popitem()
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


# -- its options --------------------------------------------------------------------------------


def test_texts_as_strings_tokens_and_ids():
    vocab = {" ": 0, "a": 1, "b": 2, "c": 3}
    model = host(vocab_char_map=vocab)
    ids = torch.tensor([[1, 2, 0, 3], [3, 0, -1, -1]])
    given = {"cond": torch.randn(2, 9, CHANNELS), "duration": 20, "steps": 2, "seed": 0}
    expected, _ = model.sample(text=ids, **given)
    for text in (["ab c", "c?"], [["a", "b", " ", "c"], ["c", "unknown"]]):
        assert torch.equal(model.sample(text=text, **given)[0], expected)
    model.vocab_char_map = None
    with pytest.raises(ValueError, match=r"text: expected ids, or .* vocab_char_map .* has 20 ids"):
        model.sample(text=["ab c", "c?"], **given)


def test_texts_of_bytes():
    text = TextConfig(vocab=256, dim=16, layers=1)
    config = DiTConfig.for_variant("f5_v1", text=text, dim=32, depth=1, heads=2, channels=CHANNELS)
    model = F5TTS(DiT(config)).eval()
    nn.init.normal_(model.transformer.proj_out.weight)
    given = {"cond": torch.randn(2, 9, CHANNELS), "duration": 20, "steps": 2, "seed": 0}
    ids = torch.tensor([[97, 195, 169], [98, -1, -1]])
    assert torch.equal(
        model.sample(text=["aé", "b"], **given)[0], model.sample(text=ids, **given)[0]
    )


@pytest.mark.parametrize(
    ("changed", "frames"),
    [
        ({"duration": 30}, 30),
        ({"duration": 2}, 12),  # the prompt's 9 frames, the text's 11 tokens, and one
        ({"duration": 2, "lens": torch.tensor([7])}, 12),
        ({"duration": 40, "max_duration": 25}, 25),
        ({"duration": 40, "max_duration": 5}, 5),
        ({"duration": torch.tensor([31])}, 31),
        ({"duration": torch.tensor(30)}, 30),
        ({"duration": np.int64(30)}, 30),
        ({"duration": 2, "lens": 7}, 12),
        ({"lens": torch.tensor([0])}, 30),
    ],
)
def test_durations(changed, frames):
    out, _ = host().sample(**(request() | changed), steps=1)
    assert out.shape == (1, frames, CHANNELS)


def test_the_prompt_keeps_its_place():
    given = request()
    given["cond"].requires_grad_()
    prompt = given["cond"].detach()
    out, _ = host().sample(**given, steps=1, seed=0)
    assert not out.requires_grad
    assert torch.equal(out[:, :9], prompt)
    shorter, _ = host().sample(**given, lens=torch.tensor([4]), steps=1, seed=0)
    assert torch.equal(shorter[:, :4], prompt[:, :4])
    cut = given | {"cond": prompt[:, :4]}
    torch.testing.assert_close(shorter, host().sample(**cut, steps=1, seed=0)[0])
    silent, _ = host().sample(**given, steps=1, no_ref_audio=True)
    assert not silent[:, :9].any()


def test_an_edit_mask_regenerates_frames():
    given = request()
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[:, 3:5] = False
    out, _ = host().sample(**given, steps=2, seed=0, edit_mask=mask)
    emptied = given["cond"].masked_fill(~mask[..., None], 0.0)
    expected, _ = host().sample(**(given | {"cond": emptied}), steps=2, seed=0)
    assert torch.equal(out[:, :9][mask], given["cond"][mask])
    assert (out[:, 3:5] - given["cond"][:, 3:5]).abs().min() > 0
    torch.testing.assert_close(out[:, 9:], expected[:, 9:])


def test_duplicate_test_starts_late_from_the_prompt_behind_itself():
    given = request()
    given = {**given, "seed": 0, "trajectory": True}
    _, states = host().sample(**given, steps=10, duplicate_test=True, t_inter=0.2)
    _, plain = host().sample(**given, steps=10)
    assert len(states) == 9
    noise = plain[0]
    expected = 0.8 * noise
    expected[:, 9:18] += 0.2 * given["cond"]
    torch.testing.assert_close(states[0], expected)


@pytest.mark.parametrize("epss", [True, False])
def test_duplicate_test_from_the_start_is_a_plain_sample(epss):
    given = request() | {"steps": 5, "sway_sampling_coef": -1.0, "seed": 0, "use_epss": epss}
    model = host()
    expected, _ = model.sample(**given)
    out, _ = model.sample(**given, duplicate_test=True, t_inter=0)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("seed", [np.int64(3), torch.tensor(3), [3], (np.int32(3),)])
def test_seeds_of_any_integer(seed):
    model, given = host(), request() | {"steps": 1}
    assert torch.equal(model.sample(**given, seed=seed)[0], model.sample(**given, seed=3)[0])


def test_waves_through_a_callable_of_ones_own():
    mel = Mel("vocos", n_fft=256, hop=64, channels=CHANNELS)
    model = host(mel_spec=lambda waves: torch.stack([mel(wave) for wave in waves]).mT)
    waves, given = torch.randn(2, 640), batch(request(), request(seed=1)) | {"lens": None}
    cond = torch.stack([mel(wave) for wave in waves])
    got, _ = model.sample(**given | {"cond": waves}, steps=1, seed=0)
    assert torch.equal(got, model.sample(**given | {"cond": cond}, steps=1, seed=0)[0])

    model.mel_spec = lambda waves: cond
    expected = rf"mel_spec's mels of cond: expected shape \(2, {CHANNELS}, N\), got \(2, 11, 12\)"
    with pytest.raises(ValueError, match=expected):
        model.sample(**given | {"cond": waves}, steps=1)
    with pytest.raises(TypeError, match="mel_spec: expected a callable of waves, got 'vocos'"):
        host(mel_spec="vocos")


def test_waves_and_a_vocoder():
    def mels(wave):
        return wave.unflatten(1, (-1, CHANNELS)).mT

    model = host(mel_spec=mels)
    given = request()
    seen = []
    wave, _ = model.sample(
        **(given | {"cond": given["cond"].flatten(1)}),
        steps=1,
        seed=0,
        vocoder=lambda mel: seen.append(mel) or mel.sum(1),
    )
    expected, _ = model.sample(**given, steps=1, seed=0)
    assert torch.equal(seen[0], expected.mT)
    assert torch.equal(wave, expected.sum(-1))


def test_gradients_flow_when_asked_for():
    model, given = host(), request()
    given["cond"].requires_grad_()
    out, _ = model.sample(**given, steps=3, cfg_strength=2.0, seed=0, grad=True)
    torch.testing.assert_close(out, model.sample(**given, steps=3, cfg_strength=2.0, seed=0)[0])
    out[:, 9:].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert given["cond"].grad.any()


def wrong():
    ids = {"text": torch.zeros(2, 3).long()}
    yield ids, ValueError, r"text: expected shape \(1, L\)"
    yield {"text": "word"}, ValueError, "text: expected a list of 1 texts"
    yield {"text": ["one", "two"]}, ValueError, "text: expected a list of 1 texts"
    yield {"cond": torch.zeros(1, 100)}, ValueError, "cond: expected mels .* got waves"
    yield {"cond": torch.zeros(1, 9, 5)}, ValueError, "cond: expected shape"
    yield {"duration": torch.tensor([3, 4])}, ValueError, r"duration: expected shape \(1,\)"
    yield {"lens": torch.tensor([3, 4])}, ValueError, r"lens: expected shape \(1,\)"
    yield {"seed": [1, 2]}, ValueError, "seed: expected one, or one for each of 1 rows"
    yield {"steps": 0}, ValueError, "steps: expected an integer >= 1"
    yield {"duplicate_test": True, "t_inter": 0.99}, ValueError, "t_inter: expected a time"
    yield {"duplicate_test": True, "t_inter": nan}, ValueError, "t_inter: .* in .0, 1., got nan"
    yield {"text": None}, ValueError, "text: expected a list of 1 texts, got None"
    yield {"text": [None]}, ValueError, "text: expected texts, .* got .None."
    yield {"cond": None}, TypeError, "cond: expected a tensor, got NoneType"
    yield {"cond": torch.zeros(0, 9, CHANNELS)}, ValueError, "cond: expected at least one row"
    yield {"duration": None}, TypeError, "duration: expected an integer, got None"
    yield {"duration": 30.5}, TypeError, "duration: expected an integer, got 30.5"
    yield {"duration": torch.tensor([30.5])}, TypeError, "duration: expected torch.int64"
    yield {"max_duration": 0}, ValueError, "max_duration: expected an integer >= 1, got 0"
    yield {"lens": [9]}, TypeError, "lens: expected an integer, got .9."
    for lens in (-1, 10):
        message = rf"lens: expected values in \[0, 9\], got \[{lens}\]"
        yield {"lens": torch.tensor([lens])}, ValueError, message
    yield {"seed": 1.5}, TypeError, "seed: expected an integer, got 1.5"
    yield {"cfg_strength": nan}, ValueError, "cfg_strength: expected a finite number, got nan"
    yield {"cfg_strength": "2"}, ValueError, "cfg_strength: expected a finite number, got '2'"
    yield {"edit_mask": torch.ones(9).bool()}, ValueError, r"edit_mask: expected shape \(1, frames"
    yield {"edit_mask": torch.ones(1, 9)}, TypeError, "edit_mask: expected torch.bool"


@pytest.mark.parametrize(("changed", "error", "message"), list(wrong()))
def test_wrong_arguments_are_named(changed, error, message):
    with pytest.raises(error, match=message):
        host().sample(**(request() | {"steps": 5} | changed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": nan}, "guidance: expected a finite number, got nan"),
        ({"audio_drop_prob": 1.5}, r"audio_drop_prob: .* in \[0, 1\], got 1.5"),
        ({"cond_drop_prob": nan}, "cond_drop_prob: "),
        ({"prompt_drop_prob": None}, "prompt_drop_prob: "),
        ({"frac_lengths_mask": (0.8, 0.7)}, r"frac_lengths_mask: .* ascending .* \(0.8, 0.7\)"),
        ({"frac_lengths_mask": (0.7, 1.2)}, "frac_lengths_mask: .* got 1.2"),
        ({"frac_lengths_mask": 0.7}, "frac_lengths_mask: expected two shares, got 0.7"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        host(**options)


def test_a_students_guidance_is_a_number():
    with pytest.raises(ValueError, match="guidance: expected a finite number, got nan"):
        host().student(nan)
    with pytest.raises(ValueError, match="guidance: expected least <= greatest"):
        host().student((3.0, 1.0))


def test_a_range_of_guidance_is_for_an_objective_that_takes_it(monkeypatch):
    model = host()
    copied = counted(model.transformer, "student", monkeypatch)
    with pytest.raises(TypeError, match=r"objective: expected one .* guidance, as .*Split"):
        model.student((1.0, 4.0), objective=SplitMeanFlow)
    assert copied == []
    for objective in (partial(IntMeanFlow, nfe=2), lambda *_, **given: IntMeanFlow(*_, **given)):
        assert model.student((1.0, 4.0), objective=objective).objective.guidance == (1.0, 4.0)
    assert isinstance(model.student(objective=SplitMeanFlow).objective, SplitMeanFlow)


@pytest.mark.parametrize("other", [nn.Linear(1, 1), None, {"transformer": 1}])
def test_other_objects_are_refused(other):
    with pytest.raises(ValueError, match=r"cfm: expected F5-TTS's CFM, got .* without"):
        from_host(other)
    with pytest.raises(ValueError, match="cfm: expected an object that apply_to has patched"):
        restore(other)


def test_other_models_are_refused():
    for model in (small_model("cosyvoice3"), small_model("f5_v1").baked(), nn.Linear(1, 1)):
        with pytest.raises(TypeError, match="model: expected a DiT of an F5 variant"):
            F5TTS(model)


# -- training -----------------------------------------------------------------------------------


def mels(lengths=(30, 22), seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, frames = len(lengths), max(lengths)
    return {
        "inp": torch.randn(rows, frames, CHANNELS, generator=generator),
        "text": torch.randint(20, (rows, 9), generator=generator),
        "lens": torch.tensor(lengths),
    }


def test_flow_matching_loss():
    given, model = mels(), host(audio_drop_prob=0.0, cond_drop_prob=0.0)
    torch.manual_seed(3)
    loss, prompt, pred = model(**given)
    torch.manual_seed(3)
    shares, starts = torch.zeros(2).uniform_(0.7, 1.0), torch.rand(2)
    x1, x0 = given["inp"], torch.randn(2, 30, CHANNELS)
    t = torch.rand(2)
    errors = []
    for i, length in enumerate((30, 22)):
        size = int(shares[i] * length)
        start = int((length - size) * starts[i])
        span = slice(start, start + size)
        assert not prompt[i, span].any()
        outside = torch.ones(30, dtype=torch.bool)
        outside[span] = False
        assert torch.equal(prompt[i, outside], x1[i, outside])
        cond = model.transformer.prepare(prompt[i : i + 1, :length], text=given["text"][i : i + 1])
        z = torch.lerp(x0[i : i + 1], x1[i : i + 1], t[i])[:, :length]
        v = model.transformer(z, t[i : i + 1], t[i : i + 1], cond)
        torch.testing.assert_close(pred[i : i + 1, :length], v, rtol=0, atol=1e-5)
        errors.append((v[0] - (x1 - x0)[i, :length])[span].square().flatten())
    torch.testing.assert_close(loss, torch.cat(errors).mean(), rtol=1e-5, atol=0)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", ["audio_drop_prob", "cond_drop_prob"])
def test_flow_matching_drops_conditions(kind):
    drops = {"audio_drop_prob": 0.0, "cond_drop_prob": 0.0, kind: 1.0}
    given, model = mels((30, 30)), host(**drops)
    other = given | {"text": given["text"].flip(1)}
    runs = []
    for inputs in (given, other):
        torch.manual_seed(3)
        runs.append(model(**inputs)[2])
    assert torch.equal(*runs) == (kind == "cond_drop_prob"), "text is dropped with all else only"


def test_one_length_for_all_rows():
    losses = []
    for lens in (torch.tensor([22, 22]), torch.tensor(22), 22):
        torch.manual_seed(0)
        random.seed(0)
        losses.append(host()(**(mels() | {"lens": lens}))[0].detach())
    assert losses[0] == losses[1] == losses[2]


def recorded(seen):
    """A stand-in for an objective that keeps its batch."""

    def objective(student, batch):
        seen.append(batch)
        cond = student.prepare(lengths=batch.lengths, **batch.conditions)
        t = torch.zeros(len(batch.x1))
        u = student(batch.x1, t, t + 1, cond)
        return u.square().mean(), {}

    return objective


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lens": torch.tensor([30, 0])}, r"lens: expected values in \[1, 30\], got \[30, 0\]"),
        ({"inp": torch.zeros(0, 30, CHANNELS)}, "inp: expected at least one row"),
        ({"text": None}, "text: expected a list of 2 texts"),
    ],
)
def test_wrong_batches_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        host()(**(mels() | changed))


def test_an_objective_has_to_call_its_student():
    with pytest.raises(ValueError, match="objective: expected one that calls the student"):
        host(objective=lambda student, batch: (batch.x1.sum(), {}))(**mels())


@pytest.mark.parametrize("dropped", [0.0, 1.0])
def test_what_an_objective_trains_on(dropped):
    seen, given = [], mels()
    model = host(objective=recorded(seen), prompt_drop_prob=dropped, audio_drop_prob=1.0)
    loss, prompt, pred = model(**given)
    assert pred.shape == prompt.shape == given["inp"].shape
    torch.testing.assert_close(loss, pred.square().mean())
    (got,) = seen
    assert torch.equal(got.x1, given["inp"])
    assert torch.equal(got.lengths, given["lens"])
    assert torch.equal(got.conditions["text"], given["text"]), "never dropped"
    shares = got.loss_mask.sum(1) / given["lens"]
    assert bool(((shares > 0.6) & (shares <= 1)).all())
    assert not (got.loss_mask & ~got.valid()).any(), "spans end with their rows"
    kept = torch.where(got.loss_mask[..., None], 0.0, given["inp"])
    assert torch.equal(got.conditions["prompt"], kept * (1 - dropped))


def distilling(variant="f5_v1", **options):
    return host(variant).student(objective=partial(IntMeanFlow, nfe=2), **options)


def test_distillation_trains_estimator_and_mixer_only(variant):
    student = distilling(variant)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    before = copy.deepcopy(student.state_dict())
    teacher = student.objective.teacher.model
    teacher_before = copy.deepcopy(teacher.state_dict())
    loss, _, _ = student.train()(**mels())
    loss.backward()
    optimizer.step()
    for name, value in student.state_dict().items():
        still = "text_embed" in name or "rotary" in name
        assert torch.equal(value, before[name]) == still, name
    assert all(torch.equal(v, teacher_before[k]) for k, v in teacher.state_dict().items())
    assert not student.transformer.text_embed.training
    assert student.transformer.transformer_blocks.training
    assert not teacher.training


def told_its_guidance(**options):
    """Whose embedding of w is not 0 any more."""
    student = distilling(guidance=(1.0, 4.0), **options).eval()
    embedding = student.transformer.guidance_embed.mlp[2].weight
    nn.init.normal_(embedding, std=0.1, generator=seeded(0))
    return student


def test_a_student_that_is_told_its_guidance(tmp_path):
    """Trains on a range of w, and speaks with the client's `cfg_strength`."""
    student = told_its_guidance(nfe=2)
    assert student.objective.guidance == (1.0, 4.0)
    student.train()(**mels())[0].backward()
    assert student.transformer.guidance_embed.mlp[2].weight.grad.abs().max() > 0

    given = request() | {"seed": 0}
    save_student(student.transformer, path := tmp_path / "student.pt", grid=student.grid)
    for host in (student.eval(), from_student(path)):
        prompt = nn.functional.pad(given["cond"], (0, 0, 0, 21))
        for strength in (0.5, 2.0):
            cond = host.transformer.prepare(prompt, text=given["text"], guidance=1 + strength)
            noise = torch.randn(1, 30, CHANNELS, generator=seeded(0))
            want = sampler.sample(host.transformer, noise, cond, nfe=2)
            assert torch.equal(host.sample(**given, cfg_strength=strength)[1][0], want)
    weak, strong = (student.sample(**given, cfg_strength=s)[0] for s in (0.5, 2.0))
    assert relative_rms(weak, strong) > 1e-3


def test_an_update_reads_the_text_once(monkeypatch):
    student = distilling()
    towers = student.transformer.text_embed, student.objective.teacher.model.text_embed
    calls = [counted(tower, "forward", monkeypatch) for tower in towers]
    student(**mels())
    assert list(map(len, calls)) == [1, 1]


def test_a_student_recomputes_activations_as_its_teacher():
    model = host()
    assert not model.student().transformer.checkpoint_activations
    model.transformer.checkpoint_activations = True
    assert model.student().transformer.checkpoint_activations


def test_a_teacher_is_outside_and_shared():
    student = distilling()
    assert [name.split(".")[0] for name, _ in student.named_children()] == ["transformer"]
    twin = copy.deepcopy(student)
    assert twin.objective.teacher is student.objective.teacher
    assert twin.transformer.proj_out.weight is not student.transformer.proj_out.weight
    again = pickle.loads(pickle.dumps(student))
    given = request() | {"steps": 2, "seed": 0}
    assert torch.equal(again.sample(**given)[0], student.sample(**given)[0])


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({"nfe": 3}, grids.uniform(3)),
        ({"grid": "sway", "nfe": 2}, grids.sway(2)),
        ({"grid": [0.0, 0.3, 1.0]}, torch.tensor([0.0, 0.3, 1.0])),
    ],
)
def test_a_student_keeps_its_schedule(monkeypatch, options, times):
    student = distilling(**options).eval()
    seen = counted(student.transformer, "tables", monkeypatch)
    prepared = counted(student.transformer, "velocity", monkeypatch)
    student.sample(**request(), steps=32, cfg_strength=2.0, sway_sampling_coef=-1.0)
    ((t, r),) = seen
    assert torch.equal(t, times[:-1])
    assert torch.equal(r, times[1:])
    assert [cond.rows for *_, cond in prepared] == [1] * (len(times) - 1), "without guidance"
    with pytest.raises(ValueError, match="duplicate_test: expected False"):
        student.sample(**request(), duplicate_test=True)


def test_a_host_on_the_weights_of_a_host():
    model = host("f5_v0", vocab_char_map={"a": 1})
    again, own = from_host(model, nfe=2), from_host(model, share=False)
    assert again.transformer is model.transformer
    assert again.vocab_char_map == {"a": 1}
    assert own.transformer.proj_out.weight is not model.transformer.proj_out.weight
    assert Teacher(own.transformer).model is own.transformer
    given = request() | {"steps": 2, "seed": 0}
    assert torch.equal(own.sample(**given)[0], model.sample(**given)[0])


def test_hosts_from_files(tmp_path, variant):
    model = F5TTS(small_model(variant, heads=1, head_dim=64)).eval()
    given = request() | {"steps": 3, "cfg_strength": 2.0, "seed": 0}
    published = {f"ema_model.{name}": value for name, value in model.state_dict().items()}
    save_file(published, tmp_path / "model.safetensors")
    vocab = {chr(97 + i): i for i in range(20)}
    loaded = from_checkpoint(tmp_path / "model.safetensors", variant, vocab_char_map=vocab)
    assert loaded.vocab_char_map == vocab
    with pytest.raises(ValueError, match="vocab_char_map: expected the model's 20 tokens, got 1"):
        from_checkpoint(tmp_path / "model.safetensors", variant, vocab_char_map={"a": 1})
    assert torch.equal(loaded.sample(**given)[0], model.sample(**given)[0])

    student = model.student(2.5, grid=[0.0, 0.3, 1.0])
    path = tmp_path / "student.safetensors"
    save_student(student.transformer, path, grid=student.grid, guidance=student.guidance)
    again = from_student(path)
    assert again.guidance == 2.5
    assert torch.equal(again.grid, student.grid)
    assert torch.equal(again.sample(**given)[0], student.sample(**given)[0])
    assert torch.equal(from_student(path, nfe=4).grid, grids.uniform(4))
