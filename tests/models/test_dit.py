import copy

import pytest
import safetensors.torch
import torch

from benchmarks.plain import plain
from imf_kernels import backend, dispatch, grids, sampler
from imf_kernels.models import Conditioning, DiT, DiTConfig, TextConfig
from imf_kernels.models.positions import GroupedConv
from tests.models.tools import (
    VARIANTS,
    conditions,
    one_row,
    relative_rms,
    small_model,
)
from tests.ops.tools import kernel_backends

LENGTHS = [60, 96, 1, 33]


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def times(rows):
    return torch.linspace(0.1, 0.6, rows), torch.linspace(0.3, 1.0, rows)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packed", [False, True, sum(LENGTHS) + 11])
def test_a_batch_equals_its_rows_whatever_fills_the_padding(variant, guided, streaming, packed):
    model = small_model(variant, chunk=20).student()
    given = conditions(model, LENGTHS)
    switches = {"guided": guided, "streaming": streaming}
    rows = len(LENGTHS)
    x, (t, r) = torch.randn(rows, max(LENGTHS), 12), times(rows)
    for row, length in enumerate(LENGTHS):
        x[row, length:] = torch.nan
        given["prompt"][row, length:] = torch.inf
        if "mu" in given:
            given["mu"][row, length:] = torch.nan
    with torch.no_grad():
        batch = model(x, t, r, model.prepare(**given, **switches, packed=packed))
        for row, length in enumerate(LENGTHS):
            pick = slice(row, row + 1)
            cond = model.prepare(**one_row(given, row), **switches)
            alone = model(x[pick, :length], t[pick], r[pick], cond)
            for branch in range(1 + guided):
                together = batch[branch * rows + row]
                assert relative_rms(together[:length], alone[branch]) <= 1e-5
                assert not together[length:].any()


@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_1_to_3000_frames_equal_themselves_alone(variant, packed):
    model, lengths = small_model(variant).student(), [3000, 1, 17, 640, 2, 1250]
    given, x, (t, r) = conditions(model, lengths), torch.randn(6, 3000, 12), times(6)
    with torch.no_grad():
        batch = model(x, t, r, model.prepare(**given, packed=packed))
        for row, length in enumerate(lengths):
            pick = slice(row, row + 1)
            cond = model.prepare(**one_row(given, row))
            alone = model(x[pick, :length], t[pick], r[pick], cond)
            assert relative_rms(batch[row, :length], alone[0]) <= 1e-5


def test_fused_storage_gives_the_same_gradients(variant):
    """q, k and v, and all adaLN weights, are read where they lie, and get their own gradients."""
    model = small_model(variant).student().train()
    given, x, (t, r) = conditions(model, [30, 22]), torch.randn(2, 30, 12), times(2)
    gradients = []
    for fused in (False, True):
        if fused:
            model.fuse_weights()
        model.zero_grad()
        loss = model(x, t, r, model.prepare(**given)).square().sum()
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for got, want in zip(*reversed(gradients), strict=True):
        assert relative_rms(got, want) <= 1e-5
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    before = model(x, t, r, model.prepare(**given)).detach()
    optimizer.step()
    copied = copy.deepcopy(model)  # whose parameters lie apart
    with torch.enable_grad():
        after, same = (m(x, t, r, m.prepare(**given)) for m in (model, copied))
    assert relative_rms(after.detach(), same.detach()) <= 1e-6
    assert not torch.equal(after, before)
    with torch.no_grad():
        model.transformer_blocks[0].attn.to_q.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an in-place operation"):
        after.square().sum().backward()


def test_fused_weights_are_saved_whole(variant, tmp_path):
    model, path = small_model(variant), tmp_path / "model.safetensors"
    model.fuse_weights()
    state = model.state_dict()
    assert len({value.untyped_storage().data_ptr() for value in state.values()}) == len(state)
    safetensors.torch.save_model(torch.nn.ModuleList([model]), path)
    loaded = torch.nn.ModuleList([small_model(variant, seed=1)])
    loaded[0].fuse_weights()
    safetensors.torch.load_model(loaded, path)
    for name, value in loaded[0].state_dict().items():
        assert torch.equal(value, state[name]), name
    kept = model.state_dict(keep_vars=True)
    assert all(kept[name] is parameter for name, parameter in model.named_parameters())


def test_packed_rows_give_the_same_gradients(variant):
    model = small_model(variant).student().train()
    given, x, (t, r) = conditions(model, [30, 22]), torch.randn(2, 30, 12), times(2)
    gradients = []
    for packed in (False, True, 70):
        model.zero_grad()
        model(x, t, r, model.prepare(**given, packed=packed)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for other in gradients[1:]:
        for got, want in zip(other, gradients[0], strict=True):
            assert relative_rms(got, want) <= 1e-5


def test_packed_conditionings_are_whole_or_halved(variant):
    model = small_model(variant)
    given, x, (t, r) = conditions(model, [30, 22]), torch.randn(2, 30, 12), times(2)
    cond = model.prepare(**given, guided=True, packed=60)
    with torch.no_grad():
        both = model(x, t, r, cond)
        half = model(x, t, r, cond.conditional(2))
    assert relative_rms(half, both[:2]) <= 1e-6
    with pytest.raises(ValueError, match="rows: expected padded"):
        cond.take(slice(0, 1))


def test_upstream_padding_lets_padding_in(variant):
    """As F5 does it; and at batch 1, where nothing is padded, it changes nothing."""
    model = small_model(variant)
    given = conditions(model, [60, 96])
    x, (t, r) = torch.randn(2, 96, 12), times(2)
    with torch.no_grad():
        ours = model(x, t, r, model.prepare(**given))
        theirs = model(x, t, r, model.prepare(**given, upstream_padding=True))
        assert relative_rms(theirs[0, :60], ours[0, :60]) > 1e-3
        assert relative_rms(theirs[1], ours[1]) <= 1e-5
        assert theirs[0, 60:].any(), "padding moves as well"
        assert not ours[0, 60:].any()


def test_student_equals_the_conditional_teacher_bit_for_bit(variant):
    teacher = small_model(variant)
    student = teacher.student().eval()
    given = conditions(teacher, LENGTHS)
    x, (t, r) = torch.randn(4, 96, 12), times(4)
    with torch.no_grad():
        expected = teacher(x, t, t, teacher.prepare(**given))
        for end in (t, r, torch.ones(4)):
            assert torch.equal(student(x, t, end, student.prepare(**given)), expected)


def test_student_follows_r_once_its_mixer_is_trained(variant):
    student = small_model(variant).student()
    given = conditions(student, [20])
    x, t = torch.randn(1, 20, 12), torch.tensor([0.2])
    before = copy.deepcopy(student.state_dict())
    loss = student(x, t, torch.tensor([0.7]), student.prepare(**given)).square().sum()
    loss.backward()
    assert student.time_embed_mixer.weight.grad[:, 32:].abs().sum() > 0
    assert all(p.grad is not None for p in student.parameters())
    with torch.no_grad():
        student.time_embed_mixer.weight -= 0.1 * student.time_embed_mixer.weight.grad.sign()
        near, far = (student(x, t, torch.tensor([r]), student.prepare(**given)) for r in (0.3, 0.9))
    assert not torch.equal(near, far)
    assert before.keys() == student.state_dict().keys()


def test_mixer_stays_in_float32_under_autocast(variant):
    student = small_model(variant).student()
    t, r = times(3)
    with torch.no_grad():
        plain = student.embed_time(t, r)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(student.embed_time(t, r), plain)


def test_gradients_reach_every_parameter_under_autocast(variant):
    model = small_model(variant)
    given = conditions(model, [24, 17])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v = model(torch.randn(2, 24, 12), *times(2), model.prepare(**given, guided=True))
    v.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_half_precision_keeps_angles_times_and_state_exact(variant):
    model = small_model(variant)
    given = conditions(model, [3000])
    rope = model.prepare(**given)["rope"]
    model = model.bfloat16()
    cond = model.prepare(**given)
    assert torch.equal(cond["rope"], rope)
    positions = torch.arange(3000, dtype=torch.float64)
    angles = torch.outer(positions, model.rotary_embed.inv_freq.double())
    exact = torch.cat([angles.cos(), angles.sin()], dim=-1)
    assert (rope - exact).abs().max() < 1e-6
    assert cond["conditions"].dtype == torch.bfloat16
    mel = sampler.sample(model, torch.randn(1, 3000, 12), cond, grids.uniform(2))
    assert mel.dtype == torch.float32
    assert mel.isfinite().all()


def test_half_precision_is_near_float32(variant):
    model = small_model(variant)
    given = conditions(model, [40, 25])
    x, (t, r) = torch.randn(2, 40, 12), times(2)
    with torch.no_grad():
        exact = model(x, t, r, model.prepare(**given))
        half = model.bfloat16()
        assert relative_rms(half(x, t, r, half.prepare(**given)).float(), exact) < 0.03


def test_permuted_rows_permute_the_output(variant):
    model = small_model(variant)
    given = conditions(model, LENGTHS)
    x, (t, r), order = torch.randn(4, 96, 12), times(4), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        expected = model(x, t, r, model.prepare(**given))[order]
        shuffled = model.prepare(**{name: value[order] for name, value in given.items()})
        got = model(x[order], t[order], r[order], shuffled)
        taken = model(x[order], t[order], r[order], model.prepare(**given).take(order))
    assert relative_rms(got, expected) <= 1e-6
    assert torch.equal(taken, got)


def test_guided_shares_the_state_and_drops_the_conditions(variant):
    model = small_model(variant)
    given = conditions(model, [30, 22])
    x, (t, r) = torch.randn(2, 30, 12), times(2)
    with torch.no_grad():
        cond = model.prepare(**given, guided=True)
        both = model(x, t, r, cond)
        assert both.shape == (4, 30, 12)
        conditional = model(x, t, r, model.prepare(**given))
        assert relative_rms(both[:2], conditional) <= 1e-5
        again = model(x, t, r, cond.conditional(2))
        assert relative_rms(again, conditional) <= 1e-6
        others = conditions(model, [30, 22], seed=7) | {"text": given.get("text")}
        others = {k: v for k, v in others.items() if v is not None}
        swapped = model(x, t, r, model.prepare(**others, guided=True))
    torch.testing.assert_close(swapped[2:], both[2:])
    assert not torch.allclose(swapped[:2], both[:2])


def test_conditioning_is_what_it_declares(variant):
    model = small_model(variant)
    given = conditions(model, [30, 22])
    padded = model.prepare(**given, guided=True, streaming=True, upstream_padding=True)
    packed = model.prepare(**given, guided=True, packed=True)
    assert padded.keys() | packed.keys() == model.specs.keys()
    for name, tensor in (*padded.items(), *packed.items()):
        spec = model.specs[name]
        assert tensor.shape == spec.shape(rows=4, frames=30, total=104)
        assert tensor.dtype == (spec.dtype or model.dtype)


def test_inputs_are_what_prepare_takes(variant):
    model = small_model(variant)
    given = {
        name: torch.full(spec.shape(rows=2, frames=9), spec.pad, dtype=spec.dtype)
        for name, spec in model.inputs.items()
    }
    cond = model.prepare(**given)
    assert cond.rows == 2
    assert all(tensor.isfinite().all() for tensor in cond.values())


@pytest.mark.parametrize("streaming", [False, True])
def test_padding_by_the_specs_changes_no_row(variant, streaming):
    """As a static buffer would hold it: more frames, and rows of one frame."""
    model = small_model(variant, chunk=10)
    given = conditions(model, [30, 22])
    cond = model.prepare(**given, streaming=streaming)
    padded = {}
    for name, tensor in cond.items():
        spec = cond.specs[name]
        grow = [{"rows": 3, "frames": 20}.get(dim, 0) for dim in spec.dims]
        widths = [width for amount in reversed(grow) for width in (0, amount)]
        padded[name] = torch.nn.functional.pad(tensor, widths, value=spec.pad)
    x, (t, r) = torch.randn(5, 50, 12), times(5)
    with torch.no_grad():
        expected = model(x[:2, :30], t[:2], r[:2], cond)
        got = model(x, t, r, Conditioning(padded, cond.specs))
    assert relative_rms(got[:2, :30], expected) <= 1e-5
    assert got.isfinite().all()
    moved = cond.to("meta")
    assert moved.specs == cond.specs
    assert {tensor.device.type for tensor in moved.values()} == {"meta"}


def test_streaming_sees_whole_blocks_and_the_past_only():
    model = small_model("cosyvoice3", chunk=10)
    given = conditions(model, [40])
    x, (t, r) = torch.randn(1, 40, 12), times(1)

    def run(x, **switches):
        with torch.no_grad():
            return model(x, t, r, model.prepare(**given, **switches))

    changed = x.clone()
    changed[:, 25] += 1
    before, after = run(x, streaming=True), run(changed, streaming=True)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:25], after[:, 20:25])
    assert not torch.equal(run(x)[:, :20], run(changed)[:, :20])


def test_untrained_model_answers_zero():
    model = DiT(DiTConfig(dim=32, depth=2, heads=2, head_dim=16, channels=12))
    given = conditions(model, [9])
    with torch.no_grad():
        assert not model(torch.randn(1, 9, 12), *times(1), model.prepare(**given)).any()


@pytest.mark.parametrize("switches", [{"qk_norm": True}, {"long_skip": True}, {"ff_mult": 4}])
def test_state_dicts_carry_their_sizes(variant, switches):
    model = small_model(variant, **switches)
    loaded = DiT.from_state_dict(model.state_dict(), variant, heads=2).eval()
    assert loaded.config == model.config
    given = conditions(model, [12])
    x, (t, r) = torch.randn(1, 12, 12), times(1)
    with torch.no_grad():
        expected = model(x, t, r, model.prepare(**given))
        assert torch.equal(loaded(x, t, r, loaded.prepare(**given)), expected)


def test_a_missing_mixer_loads_as_the_identity_and_a_trained_one_as_itself():
    teacher = small_model("f5_v1")
    asked = DiT.from_state_dict(teacher.state_dict(), "f5_v1", heads=2, mixer=True)
    assert torch.equal(asked.time_embed_mixer.weight, torch.eye(32, 64))
    student = teacher.student()
    torch.nn.init.normal_(student.time_embed_mixer.weight)
    again = DiT.from_state_dict(student.state_dict(), "f5_v1", heads=2)
    assert torch.equal(again.time_embed_mixer.weight, student.time_embed_mixer.weight)


def test_half_checkpoints_do_not_round_the_angles():
    model = small_model("f5_v1")
    exact = model.rotary_embed.inv_freq.clone()
    half = {name: value.half() for name, value in model.state_dict().items()}
    loaded = DiT.from_state_dict(half, "f5_v1", heads=2)
    assert torch.equal(loaded.rotary_embed.inv_freq, exact)
    loaded.load_state_dict(half, assign=True)
    assert torch.equal(loaded.rotary_embed.inv_freq, exact)
    with torch.device("meta"):
        empty = DiT(model.config)
    assert torch.equal(empty.to_empty(device="cpu").rotary_embed.inv_freq, exact)


@pytest.mark.parametrize("prefix", ["", "ema_model.transformer.", "decoder.estimator."])
def test_state_dicts_load_under_their_prefix(prefix):
    model = small_model("f5_v0")
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    loaded = DiT.from_state_dict(
        state | {"other.weight": torch.ones(1)} if prefix else state, "f5_v0", heads=2
    )
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_the_mixer_may_start_elsewhere():
    teacher = small_model("cosyvoice3")
    student = teacher.student(diagonal=0.5)
    assert torch.equal(student.time_embed_mixer.weight, 0.5 * torch.eye(32, 64))


def wrong_loads():
    state = small_model("f5_v1").state_dict()
    few = {name: value for name, value in state.items() if "to_q" not in name}
    yield lambda: DiT.from_state_dict(few, "f5_v1"), "state_dict", "transformer_blocks.0.attn.to_q"
    yield lambda: DiT.from_state_dict(state, "f5"), "variant", "f5_v0, f5_v1, cosyvoice3"
    yield lambda: DiT.from_state_dict(state, "cosyvoice3"), "text", "None"
    yield lambda: DiTConfig(dim=40, depth=1, heads=1), "dim", "multiple of 16"
    yield lambda: DiTConfig(dim=32, depth=0, heads=1), "depth", ">= 1"
    yield lambda: TextConfig(vocab=0), "vocab", ">= 1"


@pytest.mark.parametrize(("call", "argument", "expected"), list(wrong_loads()))
def test_what_cannot_be_built_says_why(call, argument, expected):
    with pytest.raises(ValueError, match="expected") as caught:
        call()
    assert argument in str(caught.value)
    assert expected in str(caught.value)


def wrong_prepares():
    f5, cosyvoice3 = small_model("f5_v1"), small_model("cosyvoice3")
    texts, mus = conditions(f5, [9, 5]), conditions(cosyvoice3, [9, 5])
    yield f5, texts | {"text": None}, "text: expected a tensor"
    yield f5, texts | {"mu": mus["mu"]}, "mu: expected None"
    high, low = torch.tensor([[0, 20]] * 2), torch.tensor([[0, -5]] * 2)
    yield f5, texts | {"text": high}, r"text: expected ids in \[-1, 19\], got 0 to 20"
    yield f5, texts | {"text": low}, r"text: expected ids in \[-1, 19\], got -5 to 0"
    yield f5, texts | {"text": torch.zeros(2, 4)}, "text: expected torch.int64"
    yield f5, texts | {"prompt": texts["prompt"][..., :3]}, "prompt: expected shape"
    yield f5, texts | {"prompt": texts["prompt"].long()}, "prompt: expected torch.float32"
    yield f5, texts | {"lengths": torch.tensor([9, 10])}, r"lengths: expected values in \[1, 9\]"
    yield f5, texts | {"lengths": torch.tensor([9])}, r"lengths: expected shape \(2,\)"
    yield f5, texts | {"packed": 13}, r"packed: expected no fewer frames than .*, got 13"
    yield f5, texts | {"packed": -1}, "packed: expected an integer >= 1, got -1"
    yield f5, texts | {"packed": True, "upstream_padding": True}, "packed: expected False"
    yield cosyvoice3, mus | {"mu": mus["mu"][:, :4]}, "mu: expected shape"
    yield cosyvoice3, mus | {"spks": mus["mu"]}, "spks: expected shape"
    yield cosyvoice3, mus | {"mu": mus["mu"].long()}, "mu: expected torch.float32"


@pytest.mark.parametrize(("model", "given", "message"), list(wrong_prepares()))
def test_wrong_conditions_are_named(model, given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        model.prepare(**given)


def test_a_conditioning_of_other_rows_is_refused():
    model = small_model("cosyvoice3")
    cond = model.prepare(**conditions(model, [9, 5]), guided=True)
    t = torch.zeros(3)
    with pytest.raises(ValueError, match="x: expected 4 rows"):
        model(torch.zeros(3, 9, 12), t, t, cond)
    with pytest.raises(ValueError, match="rows: expected half of the 4"):
        cond.conditional(1)
    with pytest.raises(TypeError, match=r"cond: expected what .prepare. returned, got NoneType"):
        model(torch.zeros(3, 9, 12), t, t, None)


def test_public_sizes():
    """Parameter counts of the published checkpoints, without allocating them."""
    with torch.device("meta"):
        f5 = DiT(
            DiTConfig.for_variant(
                "f5_v1", text=TextConfig(vocab=2545), dim=1024, depth=22, heads=16
            )
        )
        small = DiT(
            DiTConfig.for_variant("f5_v0", text=TextConfig(vocab=2545), dim=768, depth=18, heads=12)
        )
        cosyvoice3 = DiT(DiTConfig.for_variant("cosyvoice3", dim=1024, depth=22, heads=16))
    assert sum(p.numel() for p in f5.parameters()) == 337_096_804
    assert sum(p.numel() for p in small.parameters()) == 159_228_772
    assert round(sum(p.numel() for p in cosyvoice3.parameters()) / 1e6, 1) == 331.1


@pytest.mark.parametrize("packed", [False, 60])
def test_compiles_without_graph_breaks(variant, packed):
    torch._dynamo.reset()
    model = small_model(variant).student().eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for frames in (24, 31):
        given = conditions(model, [frames, frames - 5])
        x, (t, r) = torch.randn(2, frames, 12), times(2)
        with torch.no_grad():
            cond = model.prepare(**given, guided=True, packed=packed)
            torch.testing.assert_close(compiled(x, t, r, cond), model(x, t, r, cond))


def test_convolutions_laid_out_for_their_kernel_stay_the_same_parameters(variant):
    model, same = small_model(variant), small_model(variant)
    convolutions = [m for m in model.modules() if isinstance(m, GroupedConv)]
    assert len(convolutions) == 2
    for convolution in convolutions:
        parameter = convolution.weight
        convolution.lay_out()
        assert parameter.is_contiguous(), "an optimizer may know it"
        model.requires_grad_(False)
        convolution.lay_out()
        model.requires_grad_(True)
        assert convolution.weight is parameter
        assert parameter.transpose(1, 2).is_contiguous()
    given, x, (t, r) = conditions(model, [30, 22]), torch.randn(2, 30, 12), times(2)
    with torch.no_grad():
        got, expected = (m(x, t, r, m.prepare(**given)) for m in (model, same))
    assert relative_rms(got, expected) <= 1e-6
    saved = safetensors.torch.load(safetensors.torch.save(model.state_dict()))
    assert all(torch.equal(saved[name], value) for name, value in same.state_dict().items())


class Adapter(torch.nn.Module):
    """A layer of somebody else in a linear layer's place."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


@pytest.mark.parametrize(
    "where", ["attn.to_q", "attn.to_v", "attn.to_out.0", "ff.ff.0.0", "ff.ff.2"]
)
@pytest.mark.parametrize("how", ["adapter", "hook"])
def test_adapters_and_hooks_are_heard(where, how):
    model, same = small_model("f5_v1"), small_model("f5_v1")
    block = model.transformer_blocks[1]
    layer, twin = block.get_submodule(where), same.transformer_blocks[1].get_submodule(where)
    with torch.no_grad():
        twin.weight *= 2
        twin.bias *= 2
    if how == "adapter":
        parent, _, name = where.rpartition(".")
        setattr(block.get_submodule(parent), name, Adapter(layer))
    else:
        layer.register_forward_hook(lambda module, args, y: 2 * y)
    cond, x, t = model.prepare(**conditions(model, [30])), torch.randn(1, 30, 12), torch.zeros(1)
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, t, cond), same(x, t, t, cond), rtol=1e-4, atol=1e-5)


def test_checkpointed_activations_change_no_gradient(variant):
    model = small_model(variant).student().train()
    given = conditions(model, [30, 22])
    x, t, r = torch.randn(2, 30, 12), torch.zeros(2), torch.ones(2)

    def gradients():
        model.zero_grad()
        cond = model.prepare(**given)
        model(x, t, r, cond).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    model.checkpoint_activations = True
    for got, want in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["auto", *kernel_backends()])
@pytest.mark.parametrize("packed", [False, True])
def test_bf16_is_as_good_as_plain_pytorch(variant, name, packed):
    """At most twice the error of the same model in plain PyTorch, against float32."""
    exact = small_model(variant, heads=1, head_dim=32)
    half = copy.deepcopy(exact).bfloat16()
    given, x, (t, r) = conditions(exact, [60, 41, 7]), torch.randn(3, 60, 12), times(3)

    def run(model, packed=False):
        with torch.no_grad():
            return model(x, t, r, model.prepare(**given, packed=packed)).float()

    with backend("reference"):
        want, plainly = run(exact), run(plain(half))
    with backend(name):
        got = run(half, packed)
    assert relative_rms(got, want) <= 2 * relative_rms(plainly, want)


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("switches", [{}, {"qk_norm": True, "long_skip": True}])
@pytest.mark.parametrize("packed", [False, 60])
def test_kernels_and_reference_agree(variant, switches, packed):
    """The whole model, forward and backward, with every fused kernel."""
    model = small_model(variant, heads=1, head_dim=32, **switches).student().train()
    given, streaming = conditions(model, [30, 22]), variant == "cosyvoice3"
    x, t, r = torch.randn(2, 30, 12), torch.zeros(2), torch.ones(2)
    results = []
    for name in ("triton", "reference"):
        model.zero_grad()
        with backend(name):
            v = model(x, t, r, model.prepare(**given, streaming=streaming, packed=packed))
            v.square().sum().backward()
        results.append([v.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for got, want in zip(*results, strict=True):
        assert relative_rms(got, want) <= 1e-4
