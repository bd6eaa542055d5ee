"""F5-TTS's host against F5-TTS itself: live objects with random weights, and its `Trainer`."""

import contextlib
import copy
import importlib
import pickle
import random
import sys
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from safetensors.torch import save as to_safetensors
from torch import nn

from benchmarks import f5_client
from imf_kernels import IntMeanFlow
from imf_kernels.hosts.f5_tts import F5TTS, apply_to, from_host, restore
from imf_kernels.models import save_student
from tests.models.tools import relative_rms

try:
    f5 = f5_client.load()
except ImportError as error:
    pytest.skip(f"needs f5-tts (make test-hosts): {error}", allow_module_level=True)

CHANNELS, VOCAB = 20, 30
VARIANTS = {
    "v0": {"text_mask_padding": False, "pe_attn_head": 1},
    "v1": {"text_mask_padding": True, "pe_attn_head": None},
    "v1, long skip, norms": {"long_skip_connection": True, "qk_norm": "rms_norm"},
    "v1, no text blocks": {"conv_layers": 0, "pe_attn_head": 2},
}
SIZES = {"dim": 64, "depth": 2, "heads": 2, "dim_head": 32, "ff_mult": 2, "text_dim": 32}


def live(variant="v1", kind=None, **options):
    """A `CFM` in which every weight counts."""
    torch.manual_seed(0)
    switches = {"conv_layers": 2, **VARIANTS[variant]} if kind is None else {}
    net = (kind or f5.DiT)(
        mel_dim=CHANNELS, text_num_embeds=VOCAB, dropout=0.0, **(SIZES | switches | options)
    )
    for name, parameter in net.named_parameters():
        if not parameter.any() or "grn" in name:
            nn.init.normal_(parameter, std=0.1)
    mel = {"n_mel_channels": CHANNELS, "mel_spec_type": "bigvgan"}  # which needs no torchaudio
    return f5.CFM(transformer=net, mel_spec_kwargs=mel, vocab_char_map={"a": 1, "b": 2}).eval()


@pytest.fixture(params=VARIANTS)
def cfm(request):
    return live(request.param)


def request(rows=1):
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(VOCAB, (rows, 12), generator=generator)
    lens = torch.tensor([14, 9, 11])[:rows]
    for row in range(rows):
        text[row, 12 - 3 * row :] = -1
    return {
        "cond": torch.randn(rows, 14, CHANNELS, generator=generator),
        "text": text,
        "duration": torch.tensor([40, 28, 33])[:rows],
        "lens": lens,
    }


OPTIONS = {
    "as its applications": {"steps": 16, "cfg_strength": 2.0, "sway_sampling_coef": -1.0},
    "without guidance": {"steps": 7, "cfg_strength": 0.0, "sway_sampling_coef": -1.0},
    "no sway": {"steps": 9},
    "no table": {"steps": 16, "use_epss": False},
    "lens": {"steps": 4, "lens": torch.tensor([8])},
    "no audio": {"steps": 4, "no_ref_audio": True},
    "duplicate": {"steps": 10, "duplicate_test": True, "t_inter": 0.2},
    "duplicate, from 0": {"steps": 5, "duplicate_test": True, "t_inter": 0},
    "duplicate, sway": {"steps": 6, "duplicate_test": True, "sway_sampling_coef": -1.0},
    "edit": {"steps": 4, "edit_mask": torch.arange(14)[None] % 5 > 1},
    "duration": {"steps": 3, "duration": 1},
    "longest": {"steps": 3, "max_duration": 22},
    "tokens": {"steps": 3, "text": [["b", "a", "?"]]},
    "string": {"steps": 3, "text": ["ab ba"]},
    "half": {"steps": 5, "cond": torch.randn(1, 14, CHANNELS, dtype=torch.float16)},
    "wave": {"steps": 3, "cond": torch.randn(1, 14 * 256)},
    "vocoder": {"steps": 3, "vocoder": lambda mel: mel.sum(1)},
}


def both(cfm, given):
    with torch.no_grad():
        ours = from_host(cfm).sample(**given)[0]
        return ours, cfm.sample(**given)[0]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_sample_is_upstreams(options):
    cfm = live()
    ours, theirs = both(cfm, request() | {"seed": 5} | options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_sample_is_upstreams_in_every_variant(cfm):
    ours, theirs = both(cfm, request() | {"seed": 5} | OPTIONS["as its applications"])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_noise_without_a_seed_is_upstreams():
    cfm, given = live(), request() | {"steps": 2}
    host = from_host(cfm)
    torch.manual_seed(3)
    theirs, _ = cfm.sample(**given)
    torch.manual_seed(3)
    ours, _ = host.sample(**given)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_upstreams_padded_batches(cfm, strength):
    given = request(3) | {"steps": 4, "cfg_strength": strength, "seed": 5}
    theirs, _ = cfm.sample(**given)
    padded, _ = from_host(cfm, upstream_padding=True).sample(**given)
    torch.testing.assert_close(padded, theirs, rtol=0, atol=1e-4)
    ours, _ = from_host(cfm).sample(**given)
    assert relative_rms(ours[1, :28], theirs[1, :28]) > 1e-3, "rows as they are alone"
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_flow_matching_loss_is_upstreams(cfm, seed):
    given = request(3)
    inputs = {"inp": torch.randn(3, 40, CHANNELS), "text": given["text"], "lens": given["duration"]}
    cfm.cond_drop_prob = 0.5
    runs = []
    for model in (cfm, from_host(cfm, upstream_padding=True)):
        random.seed(seed)
        torch.manual_seed(seed)
        model.zero_grad()
        loss, cond, pred = model(**inputs)
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters()]
        runs.append((loss.detach(), cond, pred.detach(), grads))
    for theirs, ours in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# -- live objects -------------------------------------------------------------------------------


def test_a_host_shares_or_copies_the_weights(cfm):
    shared, own = from_host(cfm), from_host(cfm, share=False)
    names = [name for name, _ in cfm.named_parameters()]
    assert names == [name for name, _ in shared.named_parameters()], "optimizers go by the order"
    assert set(cfm.state_dict()) == set(shared.state_dict())
    for theirs, ours, copied in zip(*(m.parameters() for m in (cfm, shared, own)), strict=True):
        assert ours is theirs
        assert copied is not theirs
        assert torch.equal(copied, theirs)


def refused():
    yield partial(live, kind=f5.UNetT, text_dim=64, conv_layers=0), {}, "F5-TTS's DiT, got UNetT"
    yield partial(live, kind=mmdit), {}, "F5-TTS's DiT, got MMDiT"
    yield partial(live, text_embedding_average_upsampling=True), {}, "average_upsampling"
    yield partial(live, attn_mask_enabled=True), {"upstream_padding": True}, "attn_mask_enabled"
    yield midpoint, {}, "odeint_kwargs: expected the method 'euler', got 'midpoint'"
    yield adapted, {}, "F5-TTS's DiT, missing parameters: .'proj_out.bias'"


def mmdit(text_dim, **options):
    return f5.MMDiT(**options)


def midpoint():
    cfm = live()
    cfm.odeint_kwargs = {"method": "midpoint"}
    return cfm


def adapted():
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.in_features, self.out_features = base.in_features, base.out_features

    cfm = live()
    cfm.transformer.proj_out = Adapter(cfm.transformer.proj_out)
    return cfm


@pytest.mark.filterwarnings("ignore:attn_mask_enabled")
@pytest.mark.parametrize(("make", "options", "message"), list(refused()))
def test_what_is_not_ours_to_run_is_refused(make, options, message):
    cfm = make()
    with pytest.raises(ValueError, match=message):
        from_host(cfm, **options)
    with pytest.raises(ValueError, match=message):
        apply_to(cfm, **options)
    assert "sample" not in cfm.__dict__, "left as it was"


def keeps_no_states(cfm):
    """As ours does unless asked to, and upstream never."""
    return len(cfm.sample(**request(), steps=2, seed=0)[1]) == 1


def state_of(cfm):
    return {name: value.clone() for name, value in cfm.state_dict().items()}


def test_a_patched_object_answers_as_ours_until_it_is_restored(cfm):
    before, attributes = state_of(cfm), set(cfm.__dict__)
    modules = dict(cfm.named_modules())
    addresses = [p.untyped_storage().nbytes() for p in cfm.parameters()]
    given = request() | {"steps": 5, "seed": 0}
    theirs, _ = cfm.sample(**given)
    apply_to(cfm)
    host = apply_to(cfm, nfe=3)
    with pytest.raises(ValueError, match="cond_drop_prob"):
        apply_to(cfm, cond_drop_prob=2)
    assert cfm.sample.__self__ is host, "as before"
    assert cfm.forward.func.__self__ is host
    assert len(cfm.sample(**given, trajectory=True)[1]) == 4, "the new options"
    apply_to(cfm)
    assert keeps_no_states(cfm)
    torch.testing.assert_close(cfm.sample(**given)[0], theirs, rtol=0, atol=1e-4)
    assert set(cfm.state_dict()) == set(before)
    cfm.load_state_dict(before)
    assert to_safetensors(cfm.state_dict()), "no tensors that share memory"

    restore(cfm)
    with pytest.raises(ValueError, match="cfm: expected an object that apply_to has patched, got"):
        restore(cfm)
    assert set(cfm.__dict__) == attributes
    assert dict(cfm.named_modules()) == modules
    assert list(cfm.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in cfm.state_dict().items())
    assert [p.untyped_storage().nbytes() for p in cfm.parameters()] == addresses
    assert torch.equal(cfm.sample(**given)[0], theirs)


def test_a_patched_objects_weights_live_on():
    """Optimizers from before, loads, casts and moves are seen, while patched and after."""
    cfm = live()
    optimizer = torch.optim.SGD(cfm.parameters(), lr=0.1)
    apply_to(cfm, audio_drop_prob=0.0, cond_drop_prob=0.0)
    given = request() | {"steps": 3, "seed": 0}
    before, _ = cfm.sample(**given)
    state = state_of(cfm)
    cfm(torch.randn(1, 30, CHANNELS), ["abba"])[0].backward()
    optimizer.step()
    trained, _ = cfm.sample(**given)
    assert relative_rms(trained, before) > 1e-4
    cfm.load_state_dict(state)
    assert torch.equal(cfm.sample(**given)[0], before)
    cfm.to(torch.bfloat16)
    assert 0 < relative_rms(cfm.sample(**given)[0], before) < 0.05
    restore(cfm)
    assert {p.dtype for p in cfm.parameters()} == {torch.bfloat16}
    assert cfm.sample(**given)[0].dtype == torch.bfloat16
    expected = live().to(torch.bfloat16)
    assert torch.equal(cfm.sample(**given)[0], expected.sample(**given)[0])


@pytest.mark.filterwarnings("ignore:attn_mask_enabled")
def test_applied_again_it_is_the_original_that_counts():
    cfm = live(attn_mask_enabled=True)
    host = apply_to(cfm)
    with pytest.raises(ValueError, match="upstream_padding"):
        apply_to(cfm, upstream_padding=True)
    assert cfm.sample.__self__ is host


def test_what_an_object_had_of_its_own_comes_back():
    cfm = live()
    forward = cfm.forward = partial(cfm.forward)
    apply_to(cfm)
    apply_to(cfm)
    assert cfm.forward is not forward
    restore(cfm)
    assert cfm.forward is forward


def test_patched_and_restored_in_inference_mode():
    cfm = live()
    given = torch.randn(1, 30, CHANNELS), ["abba"]
    with torch.inference_mode():
        apply_to(cfm, cond_drop_prob=0.0)
        cfm.sample(**request(), steps=1)
    cfm.load_state_dict(state_of(cfm))
    cfm(*given)[0].backward()
    cfm.to(torch.bfloat16).float()
    cfm.transformer.proj_out.weight.data = cfm.transformer.proj_out.weight.double()
    with torch.inference_mode():
        restore(cfm)
    tensors = [*cfm.parameters(), *cfm.buffers()]
    assert not any(tensor.is_inference() for tensor in tensors)
    assert {tensor.dtype for tensor in cfm.transformer.parameters()} == {torch.float64}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_patched_object_are_patched(duplicate):
    cfm = live()
    cfm.sample(**request() | {"steps": 1})  # upstream's own keeps something of its thread
    apply_to(cfm)
    twin = duplicate(cfm)
    given = request() | {"steps": 2, "seed": 0}
    expected, _ = cfm.sample(**given)
    for parameter in cfm.parameters():
        nn.init.zeros_(parameter)
    assert keeps_no_states(twin)
    assert torch.equal(twin.sample(**given)[0], expected)
    assert not cfm.sample(**given, trajectory=True)[1].diff(dim=0).any()
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    assert not twin.sample(**given, trajectory=True)[1].diff(dim=0).any(), "weights of its own"
    restore(twin)
    assert type(twin.transformer) is f5.DiT
    assert not keeps_no_states(twin)
    assert keeps_no_states(cfm)


# -- its Trainer --------------------------------------------------------------------------------


class Mels(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, item):
        generator = torch.Generator().manual_seed(item)
        mel = torch.randn(CHANNELS, 24 + 5 * item, generator=generator)
        return {"mel_spec": mel, "text": "ab" * (item + 1)}


@contextlib.contextmanager
def utilities():
    """F5-TTS's inference utilities, of whose needs some serve neither solve nor update."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("pydub", "transformers", "vocos"):
            patched.setitem(sys.modules, name, MagicMock())
        module = importlib.import_module("f5_tts.infer.utils_infer")
    try:
        yield module
    finally:
        del sys.modules["f5_tts.infer.utils_infer"]


def spoken(mel):
    """Waves `(B, samples)` of mels `(B, C, N)`."""
    return mel.float().mean(1).repeat_interleave(256, dim=1)


def test_its_inference_utilities():
    """Which sample several texts at a time in threads."""
    cfm, texts = live(), ["ab ba", "abba abba"]
    wave = torch.randn(1, 14 * 256)

    def speak(model, texts):
        given = {"nfe_step": 4, "cross_fade_duration": 0, "device": "cpu", "progress": None}
        seeded = SimpleNamespace(sample=partial(model.sample, seed=3))
        vocoder = SimpleNamespace(decode=spoken)
        ((speech, rate, mels),) = utils.infer_batch_process(
            (wave, 24000), "ab", texts, seeded, vocoder, **given
        )
        assert rate == 24000
        return speech, mels

    with utilities() as utils:
        alone = [speak(cfm, [text]) for text in texts]
        for model in (from_host(cfm), apply_to(live()), apply_to(cfm) and cfm):
            for ours, *theirs in zip(speak(model, texts), *alone, strict=True):
                np.testing.assert_allclose(ours, np.concatenate(theirs, axis=-1), atol=1e-4)


@pytest.fixture(params=["no", "bf16"])
def trainer(request):
    """Makes trainers of a mixed precision, which accelerate keeps for the whole process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield partial(new_trainer, request.param)
    AcceleratorState._reset_state(reset_partial_state=True)


def new_trainer(mixed_precision, model, path, **options):
    return f5.Trainer(
        model,
        epochs=1,
        learning_rate=1e-2,
        num_warmup_updates=1,
        save_per_updates=2,
        batch_size_per_gpu=2,
        logger=None,
        checkpoint_path=str(path),
        accelerate_kwargs={"cpu": True, "mixed_precision": mixed_precision},
        **options,
    )


def student_host():
    return from_host(live()).student(objective=partial(IntMeanFlow, nfe=2))


def patched_with_an_objective():
    cfm = live()
    apply_to(cfm, objective=student_host().objective).freeze()
    return cfm


@pytest.mark.parametrize("make", [student_host, patched_with_an_objective])
def test_the_trainer_distils(tmp_path, trainer, make):
    model = make()
    objective = (model if isinstance(model, F5TTS) else model.sample.__self__).objective
    before, teacher = state_of(model), state_of(objective.teacher.model)
    training = trainer(model, tmp_path)
    training.train(Mels(), num_workers=1)  # two updates; without a worker it crashes
    after = state_of(model)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert "transformer.proj_out.weight" in moved
    assert ("transformer.time_embed_mixer.weight" in moved) == isinstance(model, F5TTS)
    assert not any("text_embed" in name for name in moved)
    still = objective.teacher.model.state_dict()
    assert all(torch.equal(value, still[name]) for name, value in teacher.items())

    averaged = training.ema_model.ema_model
    assert averaged.state_dict().keys() == after.keys()
    again = make()
    resumed = trainer(again, tmp_path)
    resumed.scheduler = None
    assert resumed.load_checkpoint() == 2
    assert all(torch.equal(value, after[name]) for name, value in again.state_dict().items())
    given = request() | {"steps": 2, "cfg_strength": 0.0, "seed": 0}
    expected = averaged.sample(**given)[0]
    assert torch.equal(resumed.ema_model.ema_model.sample(**given)[0], expected)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_trainer_starts_from_a_saved_student(tmp_path, trainer, suffix):
    cfm, student = live(), from_host(live()).student().transformer
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(1.1)
    path = tmp_path / f"pretrained_s{suffix}"
    save_student(student, path)
    (tmp_path / "pretrained_s.student.safetensors").unlink()  # it might take this one
    training = trainer(cfm, tmp_path)
    assert training.load_checkpoint() == 0
    expected = student.state_dict()
    for model in (cfm, training.ema_model.ema_model):
        for name, value in model.transformer.state_dict().items():
            assert torch.equal(value, expected[name]), name


def test_the_trainer_logs_samples_of_a_patched_object(tmp_path, trainer, monkeypatch):
    cfm, waves = live(), {}
    attributes = set(vars(cfm))
    apply_to(cfm)

    def save(path, wave, rate):
        waves[path.split("_")[-1]] = wave

    monkeypatch.setattr(sys.modules[f5.Trainer.__module__].torchaudio, "save", save, raising=False)
    with utilities() as utils:
        monkeypatch.setattr(utils, "nfe_step", 2)
        monkeypatch.setattr(utils, "load_vocoder", lambda **_: SimpleNamespace(decode=spoken))
        trainer(cfm, tmp_path, log_samples=True).train(Mels(), num_workers=1)
    assert waves["gen.wav"].shape == waves["ref.wav"].shape, "twice the prompt's duration"
    assert waves["gen.wav"].isfinite().all()

    restore(cfm)
    assert set(vars(cfm)) == attributes, "nothing of accelerate's either"
    again = trainer(cfm, tmp_path / "again")
    again.train(Mels(), num_workers=1)
    assert ("_original_forward" in vars(cfm)) == again.accelerator.native_amp, "prepared anew"
