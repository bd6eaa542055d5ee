import copy
import json
import random
from dataclasses import replace

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from imf_kernels import Teacher, grids, guidance
from imf_kernels.hosts import cosyvoice
from imf_kernels.hosts.cosyvoice import CFM, BakedEstimator, Estimator
from imf_kernels.hosts.cosyvoice.baked import host_times
from imf_kernels.models import CausalUNet, DiT
from imf_kernels.objectives import IntMeanFlow
from tests.hosts.cosyvoice_host import Foreign, HostCFM, HostFlow, OldForeign, host_inputs, small
from tests.models.tools import golden, relative_rms

FAMILIES = ["dit", "unet"]
GOLDEN = ["cosy2_unet", "cosy2_unet_stream", "cosy3_dit", "cosy3_dit_stream"]


def listening(family: str) -> DiT | CausalUNet:
    """A student whose mixer listens to r."""
    torch.manual_seed(1)
    student = small(family).student().eval()
    with torch.no_grad():
        student.time_embed_mixer.weight += 0.1 * torch.randn_like(student.time_embed_mixer.weight)
    return student


def rows_alone(inputs, lengths):
    for row, length in enumerate(lengths):
        yield {
            name: value[row : row + 1, :, :length] if value.ndim == 3 else value[row : row + 1]
            for name, value in inputs.items()
        }


# -- the real models' numbers, through the host's signatures --------------------------------------


@pytest.fixture(params=GOLDEN)
def real(request):
    tensors, metadata, state = golden(request.param)
    if metadata["kind"] == "dit":
        model = DiT.from_state_dict(state, "cosyvoice3")
    else:
        heads = json.loads(metadata["config"])["num_heads"]
        model = CausalUNet.from_state_dict(state, heads=heads)
    given = {name: tensors[name] for name in ("mu", "mask", "spks", "cond")}
    return model.eval(), given | {"streaming": metadata["streaming"] == "True"}, tensors, state


@pytest.mark.parametrize("grad", [False, True])
def test_golden_forward(real, grad):
    model, given, tensors, _ = real
    both = {n: torch.cat([v, torch.zeros_like(v)]) for n, v in given.items() if n != "streaming"}
    both["mask"] = given["mask"].repeat(2, 1, 1)
    x = tensors["x"].repeat(2, 1, 1)
    for t in (torch.tensor(0.3), torch.tensor([0.3]), torch.tensor([0.3, 0.3])):
        with torch.set_grad_enabled(grad):
            got = Estimator(model)(x, t=t, streaming=given["streaming"], **both).detach()
        torch.testing.assert_close(got, tensors["estimator_out"], rtol=0, atol=2e-5)


def test_golden_sample(real):
    model, given, tensors, _ = real
    mel, cache = CFM(model)(n_timesteps=10, noise=tensors["noise"], **given)
    torch.testing.assert_close(mel, tensors["mel"], rtol=0, atol=1e-4)
    assert cache is None
    host = HostCFM(Estimator(model))
    host.rand_noise = tensors["noise"]
    torch.testing.assert_close(host(n_timesteps=10, **given)[0], tensors["mel"], rtol=0, atol=1e-4)


def test_state_dicts_are_the_hosts_and_load_strictly(real):
    model, _, _, state = real
    flow = HostFlow(CFM(model))
    prefix = "decoder.estimator."
    ours = {k.removeprefix(prefix) for k in flow.state_dict() if k.startswith("decoder.")}
    assert ours == set(state)
    parameters = {k.removeprefix(prefix) for k, _ in flow.decoder.named_parameters()}
    assert {k.removeprefix("estimator.") for k in parameters} <= set(state)

    student = HostFlow(CFM(model.student()))
    assert set(student.state_dict()) - set(flow.state_dict()) == {
        "decoder.estimator.time_embed_mixer.weight"
    }
    torch.nn.init.normal_(student.decoder.model.time_embed_mixer.weight)
    assert student.load_state_dict(flow.state_dict()).missing_keys == []
    mixer = student.decoder.model.time_embed_mixer.weight
    assert torch.equal(mixer, torch.eye(*mixer.shape))
    with pytest.raises(RuntimeError, match="Missing key"):
        student.load_state_dict({k: v for k, v in flow.state_dict().items() if "proj" not in k})


# -- the estimator --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_row_has_its_own_time_and_length(family, streaming):
    estimator, lengths = Estimator(small(family)), [61, 23, 1]
    inputs, t = host_inputs(lengths), torch.tensor([0.1, 0.6, 0.9])
    inputs["x"] = torch.randn(3, 80, 61)
    junk = dict(inputs)
    for name in ("x", "mu", "cond"):
        junk[name] = inputs[name].masked_fill(inputs["mask"] == 0, torch.nan)
    with torch.no_grad():
        whole = estimator(t=t, streaming=streaming, **junk)
        for row, alone in enumerate(rows_alone(inputs, lengths)):
            got = estimator(t=t[row], streaming=streaming, **alone)
            torch.testing.assert_close(
                whole[row : row + 1, :, : lengths[row]], got, rtol=0, atol=2e-5
            )
            assert not whole[row, :, lengths[row] :].any()
        single = estimator(t=t[:1], **inputs)
        torch.testing.assert_close(single, estimator(t=t[:1].expand(3), **inputs))


def test_long_masks_in_half_precision_are_counted_whole():
    mask = torch.ones(2, 1, 2051)
    mask[1, :, 2049:] = 0
    for dtype in (torch.float16, torch.bfloat16, torch.bool):
        assert cosyvoice.estimator.lengths_of(mask.to(dtype)).tolist() == [2051, 2049]


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_and_autocast(family):
    inputs = host_inputs([53])
    exact, _ = CFM(small(family))(n_timesteps=10, **inputs)
    for dtype, bound in ((torch.float16, 0.005), (torch.bfloat16, 0.02)):
        flow = HostFlow(CFM(small(family))).to(dtype)
        half = {name: value.to(dtype) for name, value in inputs.items()}
        mel, _ = flow.decoder(n_timesteps=10, **half)
        assert mel.dtype == torch.float32
        assert relative_rms(mel, exact) < bound
        host = HostCFM(flow.decoder.estimator)
        host.rand_noise = flow.decoder.rand_noise
        assert relative_rms(host(n_timesteps=10, **half)[0], exact) < 8 * bound
    with torch.autocast("cpu", torch.bfloat16):
        mel, _ = CFM(small(family))(n_timesteps=10, **inputs)
    assert relative_rms(mel, exact) < 0.02


def test_what_is_replaced_in_the_estimator_is_replaced_in_its_model():
    estimator = Estimator(small("dit"))
    copied = copy.deepcopy(estimator)
    assert copied.proj_out is copied.model.proj_out is not estimator.proj_out
    copied.proj_out = torch.nn.Linear(32, 80)
    assert copied.model.proj_out is copied.proj_out


def test_errors_at_the_door():
    model, inputs = small("dit"), host_inputs([9, 5])
    estimator, x, t = Estimator(model), torch.randn(2, 80, 9), torch.zeros(2)
    with pytest.raises(TypeError, match="model: expected a DiT or a CausalUNet"):
        Estimator(torch.nn.Linear(2, 2))
    holes = inputs["mask"].clone()
    holes[0, 0, 3] = 0
    with pytest.raises(ValueError, match="mask: expected ones, then zeros"):
        estimator(x, t=t, **(inputs | {"mask": holes}))
    with pytest.raises(ValueError, match=r"t: expected shape \(2,\)"):
        estimator(x, t=torch.zeros(3), **inputs)
    with pytest.raises(TypeError, match="cond: expected a tensor"):
        CFM(model)(n_timesteps=2, **(inputs | {"cond": None}))
    with pytest.raises(ValueError, match=r"no more than the noise table's 8 frames, got 9"):
        CFM(model, noise=torch.zeros(1, 80, 8))(n_timesteps=2, **inputs)
    with pytest.raises(ValueError, match="grid: expected one of"):
        CFM(model, grid="sine")
    with pytest.raises(ValueError, match="returns: expected one of tuple, tensor"):
        CFM(model, returns="list")
    for name, values in {
        "inference_cfg_rate": (float("nan"), float("inf")),
        "training_cfg_rate": (-0.1, 1.1, float("nan")),
        "sigma_min": (-1e-6, 2, float("nan")),
    }.items():
        for value in values:
            with pytest.raises(ValueError, match=f"{name}: expected a .* got {value}"):
                CFM(model, **{name: value})
    with pytest.raises(ValueError, match="static_chunk_size: expected an integer >= 1, got 0"):
        estimator.static_chunk_size = 0


# -- the decoder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_rows_alone(family):
    cfm, lengths = CFM(small(family)), [61, 23, 40]
    inputs = host_inputs(lengths)
    before = inputs["mu"].clone()
    mels, _ = cfm(n_timesteps=4, **inputs)
    assert torch.equal(inputs["mu"], before)
    for row, alone in enumerate(rows_alone(inputs, lengths)):
        mel, _ = cfm(n_timesteps=4, **alone)
        torch.testing.assert_close(mels[row : row + 1, :, : lengths[row]], mel, rtol=0, atol=1e-4)
        assert not mels[row, :, lengths[row] :].any()


def test_noise_is_the_hosts_and_random_states_are_left_alone():
    with torch.random.fork_rng():
        torch.manual_seed(0)  # what the host does, to everyone's random state
        expected = torch.randn([1, 80, 50 * 300])
    flow, inputs = live_flow(), host_inputs([30])
    states = torch.get_rng_state(), random.getstate()
    cfm = cosyvoice.apply_to(flow, noise="table")
    mel, _ = cfm(n_timesteps=3, temperature=0.5, **inputs)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert torch.equal(cfm.rand_noise, expected)
    given, _ = cfm(n_timesteps=3, noise=0.5 * expected[:, :, :30], **inputs)
    assert torch.equal(mel, given)


@pytest.mark.parametrize("absent", [False, True])
def test_noise_of_hosts_without_a_table_is_drawn(absent):
    flow, inputs = live_flow(), host_inputs([30])
    if absent:
        del flow.decoder.rand_noise
    else:
        flow.decoder.rand_noise = None
    cfm = cosyvoice.apply_to(flow)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        noise = torch.randn_like(inputs["mu"])
        torch.manual_seed(4)
        mel, _ = cfm(n_timesteps=3, **inputs)
    assert torch.equal(mel, cfm(n_timesteps=3, noise=noise, **inputs)[0])


def test_own_steps_come_before_the_flows():
    model, inputs, calls = small("dit"), host_inputs([20]), []
    model.input_embed.conv_pos_embed.register_forward_hook(lambda *_: calls.append(1))

    def steps(cfm):
        calls.clear()
        mel, _ = cfm(n_timesteps=10, **inputs)
        return len(calls), mel

    count, cosine = steps(CFM(model))
    assert count == 10
    count, own = steps(CFM(model, grid=grids.cosine(10)))
    assert count == 10
    assert torch.equal(own, cosine)
    assert steps(CFM(model, grid="uniform", nfe=2))[0] == 2
    cfm = CFM(model, grid=[0.0, 0.3, 0.5, 1.0])
    assert steps(cfm)[0] == 3
    cfm.grid, cfm.nfe = "sway", 5
    assert steps(cfm)[0] == 5


def test_teachers_are_guided_and_students_are_not():
    inputs = host_inputs([20])
    teacher = small("dit")
    student = CFM(teacher.student())(n_timesteps=4, **inputs)[0]
    plain = CFM(teacher, inference_cfg_rate=0.0)(n_timesteps=4, **inputs)[0]
    torch.testing.assert_close(student, plain)
    assert relative_rms(CFM(teacher)(n_timesteps=4, **inputs)[0], plain) > 0.01


def test_returns_what_the_host_expects():
    inputs = host_inputs([60])
    assert isinstance(CFM(small("dit"), returns="tensor")(n_timesteps=1, **inputs), torch.Tensor)
    cfm = CFM(small("dit"))
    mel, cache = cfm(n_timesteps=1, **inputs)
    assert cache is None
    noise = torch.cat([cfm.rand_noise[:, :, :8], torch.randn(1, 80, 52)], dim=2)
    expected, _ = cfm(n_timesteps=1, noise=noise, **inputs)
    assert not torch.equal(expected, mel)
    ours, _ = cfm(n_timesteps=1, noised_mels=noise[:, :, 8:], meanflow=True, **inputs)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_hosts_own_loss(rows):
    estimator = Estimator(small("unet"))
    inputs = host_inputs([31, 50, 12][:rows])
    x1 = torch.randn(inputs["mu"].shape)
    inputs["mu"].requires_grad_()
    expected = []
    for cfm in (HostCFM(estimator), CFM(estimator)):
        torch.manual_seed(3)
        loss, y = cfm.compute_loss(x1, streaming=True, **inputs)
        expected.append(
            (loss, y, *torch.autograd.grad(loss, [inputs["mu"], *estimator.parameters()]))
        )
    for host, ours in zip(*expected, strict=True):
        torch.testing.assert_close(ours, host, rtol=1e-5, atol=1e-7)
    assert all(bool(gradient.any()) for gradient in expected[1][3:])


# -- a live flow ----------------------------------------------------------------------------------


def live_flow(family="dit", **settings) -> HostFlow:
    torch.manual_seed(2)
    return HostFlow(HostCFM(Foreign(small(family)), **settings)).eval()


def utterance(frames=30):
    return {
        "token": torch.arange(frames)[None] % 10,
        "prompt": torch.randn(1, 6, 80),
        "speaker": torch.randn(1, 12),
    }


def test_golden_sample_of_a_patched_flow(real):
    model, given, tensors, _ = real
    flow = HostFlow(HostCFM(Foreign(model)))
    cosyvoice.apply_to(flow)
    mel, _ = flow.decoder(n_timesteps=10, noise=tensors["noise"], **given)
    torch.testing.assert_close(mel, tensors["mel"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_patch_and_restore(family):
    flow, given = live_flow(family), utterance(60)
    original, kept, keys = flow.decoder, flow.decoder.estimator, list(flow.state_dict())
    before = [value.clone() for value in flow.state_dict().values()]
    expected = [flow.inference(**given, streaming=streaming) for streaming in (False, True)]
    assert relative_rms(*expected) > 0.001

    cfm = cosyvoice.apply_to(flow)
    assert cfm is flow.decoder
    assert list(flow.state_dict()) == keys
    assert flow.load_state_dict(flow.state_dict()).missing_keys == []
    for streaming, mel in enumerate(expected):
        got = flow.inference(**given, streaming=bool(streaming))
        torch.testing.assert_close(got, mel, rtol=0, atol=1e-4)
    with torch.no_grad():
        cfm.model.last.weight.add_(1)  # trained: weights of its own
    with pytest.raises(TypeError, match="host's own decoder"):
        cosyvoice.from_host(flow)
    student = cosyvoice.apply_to(flow, CFM(cfm.model.student(), nfe=2))
    assert flow.decoder is student
    again = cosyvoice.apply_to(flow, grid=grids.cosine(10))
    assert flow.decoder is again
    torch.testing.assert_close(flow.inference(**given), expected[0], rtol=0, atol=1e-4)
    with pytest.raises(TypeError, match=r"cfm: expected a CFM .*, got (DiT|CausalUNet)"):
        cosyvoice.apply_to(flow, student.model)
    with pytest.raises(ValueError, match="options: expected none beside cfm, got nfe"):
        cosyvoice.apply_to(flow, student, nfe=2)
    assert flow.decoder is again

    cosyvoice.restore(flow)
    assert flow.decoder is original
    assert original.estimator is kept
    assert not flow.training
    assert not kept.training
    assert not flow._forward_pre_hooks
    for value, was in zip(flow.state_dict().values(), before, strict=True):
        assert torch.equal(value, was)
    with pytest.raises(ValueError, match="flow: expected one that apply_to has patched, got Host"):
        cosyvoice.restore(flow)


def test_a_flow_gets_its_own_decoder_back():
    flows = [live_flow(), live_flow("unet")]
    own = [flow.decoder for flow in flows]
    cfm = cosyvoice.apply_to(flows[0])
    cosyvoice.apply_to(flows[1], cfm)
    for flow, decoder in zip(flows, own, strict=True):
        cosyvoice.restore(flow)
        assert flow.decoder is decoder


@pytest.mark.parametrize("inside", [CFM, Estimator])
def test_what_is_restored_has_the_flows_dtype(inside):
    flow, given = live_flow(), utterance()
    cfm = cosyvoice.apply_to(flow)
    if inside is CFM:
        flow.bfloat16()
        given = {n: v.bfloat16() if v.is_floating_point() else v for n, v in given.items()}
        cosyvoice.apply_to(flow, nfe=3)
    else:
        cfm.estimator = Estimator(cfm.model.bfloat16())
    cosyvoice.restore(flow)
    assert len({value.dtype for value in flow.parameters()}) == 1
    assert flow.inference(**given).isfinite().all()


def test_a_flow_patched_in_inference_mode_can_be_trained():
    flow = live_flow()
    x1, inputs = torch.randn(1, 80, 30), host_inputs([30])
    with torch.inference_mode():
        cfm = cosyvoice.apply_to(flow)
        flow.inference(**utterance())
    cfm.compute_loss(x1, **inputs)[0].backward()
    assert cfm.model.last.weight.grad.any()
    flow.bfloat16()
    with torch.inference_mode():
        cosyvoice.restore(flow)
    assert not any(value.is_inference() for value in flow.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_chunk_size_is_the_models(family):
    flow, given = live_flow(family), utterance(60)
    expected = []
    for frames in (50, 20):
        flow.decoder.estimator.static_chunk_size = frames
        expected.append(flow.inference(**given, streaming=True))
    assert relative_rms(*expected) > 0.001
    cosyvoice.apply_to(flow)
    for frames, mel in zip((20, 50), reversed(expected), strict=True):
        flow.decoder.estimator.static_chunk_size = frames
        assert flow.decoder.estimator.static_chunk_size == frames
        got = flow.inference(**given, streaming=True)
        torch.testing.assert_close(got, mel, rtol=0, atol=1e-4)


@pytest.mark.parametrize("frames", [0, 20])
def test_older_hosts_mask_every_call_or_none(frames):
    host, inputs = HostCFM(OldForeign(small("unet"))), host_inputs([60])
    host.estimator.static_chunk_size = frames
    cfm = cosyvoice.from_host(HostFlow(host))
    mel, _ = cfm(n_timesteps=10, **inputs)
    torch.testing.assert_close(mel, host(n_timesteps=10, **inputs)[0], rtol=0, atol=1e-4)
    losses = []
    for decoder in (host, cfm):
        torch.manual_seed(0)
        losses.append(decoder.compute_loss(inputs["cond"], **inputs)[0].detach())
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    other = cosyvoice.from_host(HostFlow(host), streaming=not frames)(n_timesteps=10, **inputs)[0]
    assert relative_rms(other, mel) > 0.001


def test_what_is_read_of_a_live_flow():
    model = small("unet")
    host = HostCFM(Foreign(model), inference_cfg_rate=0.5, t_scheduler="linear", sigma_min=0.01)
    host.estimator.static_chunk_size = 20
    cfm = cosyvoice.from_host(HostFlow(host))
    assert cfm.model.config == replace(model.config, chunk=20)
    assert (cfm.grid, cfm.nfe, cfm.returns) == ("uniform", None, "tuple")
    assert (cfm.inference_cfg_rate, cfm.sigma_min, cfm.training_times) == (0.5, 0.01, "uniform")
    assert cfm.rand_noise is host.rand_noise
    assert not cfm.streaming

    class First(torch.nn.Module):
        """Of the first version, as far as it can be read."""

        def __init__(self):
            super().__init__()
            self.estimator, self.t_scheduler = Foreign(small("dit")), "cosine"

        def forward(self, mu, mask, n_timesteps, temperature=1.0, spks=None, cond=None):
            raise NotImplementedError

        def compute_loss(self, x1, mask, mu, spks=None, cond=None):
            return self.t_scheduler == "cosine"

    cfm = cosyvoice.from_host(HostFlow(First()))
    assert (cfm.returns, cfm.training_times, cfm.grid) == ("tensor", "cosine", "cosine")
    assert cfm.rand_noise is None
    chatterbox = First()
    chatterbox.estimator = Foreign(small("dit").student())
    assert cosyvoice.from_host(HostFlow(chatterbox)).grid == "uniform"
    unknown = HostFlow(HostCFM(torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="estimator: expected CosyVoice2's U-Net or CosyVoice3's"):
        cosyvoice.from_host(unknown)
    for nothing in (None, torch.nn.Linear(1, 1)):
        with pytest.raises(TypeError, match="flow: expected one with the host's own decoder"):
            cosyvoice.apply_to(nothing)


@pytest.mark.parametrize("family", FAMILIES)
def test_distillation_trains_the_estimator_alone(family):
    flow = live_flow(family)
    cfm = cosyvoice.apply_to(flow)
    teacher = Teacher(cfm.model, guidance.from_cosyvoice(cfm.inference_cfg_rate))
    cfm.estimator = Estimator(cfm.model.student())
    cfm.objective = IntMeanFlow(teacher, nfe=2, generator=torch.Generator().manual_seed(0))
    end = cosyvoice.freeze(flow)
    assert copy.deepcopy(flow).decoder.objective.teacher is teacher
    names = {name for name, p in flow.named_parameters() if p.requires_grad}
    assert names == {f"decoder.estimator.{name}" for name, _ in cfm.estimator.named_parameters()}
    assert "decoder.estimator.time_embed_mixer.weight" in names

    seen = []
    for model in (teacher.model, cfm.model):
        inner = model.prepare
        model.prepare = lambda inner=inner, **given: seen.append(given) or inner(**given)
    batch = {
        "token": torch.arange(30)[None].repeat(2, 1) % 10,
        "mel": torch.randn(2, 30, 80),
        "lengths": torch.tensor([30, 17]),
        "speaker": torch.randn(2, 12),
    }
    rest = [p for p in flow.parameters() if not p.requires_grad]
    frozen = parameters_to_vector(rest).clone()
    of_teacher = parameters_to_vector(teacher.model.parameters()).clone()
    optimizer = torch.optim.SGD([p for p in flow.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        flow.train()  # as the host's trainer does
        cfm.objective.generator.manual_seed(0)
        loss = flow(streaming=True, **batch)["loss"]
        assert not flow.encoder.training
        assert not flow.encoder[1].training
        assert not teacher.model.training
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert flow.encoded == 3
    assert torch.equal(frozen, parameters_to_vector(rest))
    assert torch.equal(of_teacher, parameters_to_vector(teacher.model.parameters()))
    # the coin is shared, nothing is dropped, and each prepares once
    assert [given["streaming"] for given in seen] == 6 * [True]
    for given in seen:
        assert torch.equal(given["mu"], seen[0]["mu"])
        assert given["lengths"].tolist() == [30, 17]
    end.remove()
    assert all(p.requires_grad for p in flow.parameters())
    flow.train()
    flow(streaming=False, **batch)
    assert flow.encoder.training


def test_restore_ends_freeze():
    flow = live_flow()
    flow.input_embedding.requires_grad_(False)
    required = [p.requires_grad for p in flow.parameters()]
    cosyvoice.apply_to(flow)
    cosyvoice.freeze(flow)
    cosyvoice.freeze(flow)
    assert [len(part._forward_pre_hooks) for part in flow.children()] == [1, 1, 1, 0]
    flow.train().encoder(torch.zeros(1, 16))  # some hosts train without the flow's own forward
    assert not flow.encoder.training
    cosyvoice.restore(flow)
    assert not any(part._forward_pre_hooks for part in flow.children())
    assert [p.requires_grad for p in flow.parameters()] == required


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frozen", [False, True])
def test_distillation_in_eval_gives_gradients_to_the_estimator_alone(family, frozen):
    flow = live_flow(family)
    cfm = cosyvoice.apply_to(flow)
    teacher = Teacher(cfm.model, guidance.from_cosyvoice(cfm.inference_cfg_rate))
    cfm.estimator = Estimator(cfm.model.student())
    cfm.objective = IntMeanFlow(teacher, nfe=1)
    flow.eval()
    if frozen:
        cosyvoice.freeze(flow)
    flow(
        token=torch.arange(20)[None] % 10,
        mel=torch.randn(1, 20, 80),
        lengths=torch.tensor([20]),
        speaker=torch.randn(1, 12),
        streaming=False,
    )["loss"].backward()
    with_gradients = {name for name, p in flow.named_parameters() if p.grad is not None}
    student = {f"decoder.estimator.{name}" for name, _ in cfm.model.named_parameters()}
    assert with_gradients == student
    assert "decoder.estimator.time_embed_mixer.weight" in student
    assert all(p.grad is None for p in teacher.model.parameters())


# -- a baked student behind the host's loop -------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_baked_student_behind_the_hosts_loop(family):
    student, inputs = listening(family), host_inputs([40])
    host = HostCFM(BakedEstimator(student))
    exact, _ = CFM(student, noise=host.rand_noise)(n_timesteps=10, **inputs)
    assert not torch.isnan(exact).any()
    got, _ = host(n_timesteps=10, **inputs)
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-4)
    as_teacher, _ = HostCFM(Estimator(student))(n_timesteps=10, **inputs)
    assert relative_rms(as_teacher, exact) > 0.01  # r matters
    for dtype, bound in ((torch.float16, 0.005), (torch.bfloat16, 0.02)):
        half = {name: value.to(dtype) for name, value in inputs.items()}
        for baked in (
            BakedEstimator(student).to(dtype),
            BakedEstimator(copy.deepcopy(student).to(dtype)),
        ):
            assert baked.blocks.dtype == baked.times.dtype == torch.float32
            got, _ = HostCFM(baked).to(dtype)(n_timesteps=10, **half)
            assert relative_rms(got, exact) < bound
    assert BakedEstimator(student).dtype == torch.float32
    with pytest.raises(TypeError, match="student: expected a DiT or a CausalUNet, got tuple"):
        BakedEstimator((student, None))
    # any other number of steps is another grid
    assert torch.isnan(host(n_timesteps=9, **inputs)[0]).all()
    half = {name: value.bfloat16() for name, value in inputs.items()}
    assert torch.isnan(HostCFM(BakedEstimator(student).bfloat16())(n_timesteps=9, **half)[0]).all()


def test_every_row_of_a_baked_student_finds_its_own_time():
    student, grid = listening("dit"), [0.0, 0.25, 0.5, 1.0]
    baked, inputs = BakedEstimator(student, grid, doubled=False), host_inputs([20, 20, 20])
    inputs["x"] = torch.randn(3, 80, 20)
    got = baked(t=torch.tensor([0.5, 0.0, 0.3]), **inputs)
    with torch.no_grad():
        expected = Estimator(student)(
            t=torch.tensor([0.5, 0.0, 0.3]), r=torch.tensor([1.0, 0.25, 0.3]), **inputs
        )
    torch.testing.assert_close(got[:2], expected[:2], rtol=0, atol=2e-5)
    assert torch.isnan(got[2]).all()
    assert torch.isnan(baked(t=torch.tensor(torch.nan), **inputs)).all()
    assert torch.isnan(baked(t=torch.tensor(1.0), **inputs)).all()


def test_a_doubled_row_is_evaluated_once():
    baked, rows = BakedEstimator(listening("unet")), []
    baked.model.final_proj.register_forward_hook(lambda *given: rows.append(len(given[2])))
    inputs = {n: torch.cat([v, torch.zeros_like(v)]) for n, v in host_inputs([20]).items()}
    inputs["mask"][:] = 1
    both = baked(torch.randn(1, 80, 20).repeat(2, 1, 1), t=torch.zeros(2), **inputs)
    assert rows == [20]
    assert torch.equal(both[0], both[1])
    with pytest.raises(ValueError, match="conditional and unconditional rows, got 1"):
        baked(both[:1], t=torch.zeros(1), **host_inputs([20]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_hosts_steps_add_up_and_drift_as_measured(dtype):
    times = host_times(grids.cosine(10), dtype)
    drift = (times.float() - grids.cosine(10)[:-1]).abs().max()
    assert drift <= {torch.float32: 1e-7, torch.float16: 1e-3, torch.bfloat16: 2.5e-3}[dtype]
    assert grids.cosine(10).diff().sum() == 1


def test_grids_too_close_for_a_dtype_are_refused():
    student = listening("dit")
    with pytest.raises(ValueError, match=r"grid: expected times more than .* torch\.float32"):
        BakedEstimator(student, [0.0, 0.5, 0.5000005, 1.0])
    BakedEstimator(student.half(), nfe=16)
    with pytest.raises(ValueError, match=r"torch\.bfloat16"):
        BakedEstimator(student.bfloat16(), nfe=16)
    late = BakedEstimator(listening("dit"), nfe=16)
    given = {name: value.bfloat16() for name, value in host_inputs([20]).items()}
    with pytest.raises(ValueError, match=r"torch\.bfloat16"):
        HostCFM(late)(n_timesteps=16, **given)
