import copy
import json

import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import pad

from imf_kernels import backend, dispatch, grids, guidance, solver
from imf_kernels.graphs import GraphSampler, GraphTeacher
from imf_kernels.models import CausalUNet, CausalUNetConfig, Conditioning, StepTables
from imf_kernels.sampler import sample
from imf_kernels.teacher import Teacher
from tests.graphs.tape import TapeSlot
from tests.models.naive_unet import NaiveUNet
from tests.models.tools import DATA, conditions, golden, one_row, recipe, relative_rms

LENGTHS = [61, 97, 1, 33]
SIZES = {"dim": 32, "mid_blocks": 2, "depth": 2, "heads": 2, "head_dim": 16, "channels": 12}


def small_unet(seed=0, **switches) -> CausalUNet:
    model = CausalUNet(CausalUNetConfig(**(SIZES | {"time_dim": 48, "chunk": 20} | switches)))
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(recipe(shapes, seed))
    return model.eval()


def listening_student(**switches) -> CausalUNet:
    """With a mixer that listens to r."""
    student = small_unet(**switches).student().eval()
    with torch.no_grad():
        student.time_embed_mixer.weight += 0.1 * torch.randn_like(student.time_embed_mixer.weight)
    return student


def times(rows):
    return torch.linspace(0.1, 0.6, rows), torch.linspace(0.3, 1.0, rows)


# -- the real model's numbers ---------------------------------------------------------------------


@pytest.fixture(params=["cosy2_unet", "cosy2_unet_stream"])
def cosyvoice2(request):
    tensors, metadata, state = golden(request.param)
    heads = json.loads(metadata["config"])["num_heads"]
    model = CausalUNet.from_state_dict(state, heads=heads).eval()
    tensors = {k: v.mT if v.ndim == 3 else v for k, v in tensors.items()}
    cond = model.prepare(
        tensors["cond"],
        mu=tensors["mu"],
        spks=tensors["spks"],
        guided=True,
        streaming=metadata["streaming"] == "True",
    )
    return model, cond, tensors, metadata


@pytest.mark.parametrize("grad", [False, True])
def test_golden_forward(cosyvoice2, grad):
    model, cond, tensors, metadata = cosyvoice2
    t = torch.tensor([float(metadata["t"])])
    with torch.set_grad_enabled(grad):
        both = model(tensors["x"], t, t, cond).detach()
    for got, expected in zip(both, tensors["estimator_out"], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_golden_conditional_branch_alone(cosyvoice2):
    model, cond, tensors, metadata = cosyvoice2
    t = torch.tensor([float(metadata["t"])])
    with torch.no_grad():
        alone = model(tensors["x"], t, t, cond.conditional(1))
    torch.testing.assert_close(alone, tensors["estimator_out"][:1], rtol=0, atol=2e-5)


def test_golden_sample(cosyvoice2):
    model, cond, tensors, metadata = cosyvoice2
    w = guidance.from_cosyvoice(float(metadata["inference_cfg_rate"]))
    mel = sample(model, tensors["noise"], cond, grids.cosine(int(metadata["steps"])), guidance=w)
    torch.testing.assert_close(mel, tensors["mel"], rtol=0, atol=1e-4)


def test_golden_keys_are_ours():
    with safe_open(DATA / "cosy2_unet.safetensors", "pt") as file:
        keys = dict(json.loads(file.metadata()["keys"]))
    config = CausalUNetConfig(dim=64, mid_blocks=1, depth=1, heads=2, head_dim=32, time_dim=256)
    ours = {f"estimator.{k}": list(v.shape) for k, v in CausalUNet(config).state_dict().items()}
    assert ours == keys


def test_public_size():
    """The published checkpoint's parameter count, without allocating it."""
    with torch.device("meta"):
        model = CausalUNet(CausalUNetConfig())
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 71.3


# -- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("grad", "packed"), [(False, False), (True, False), (False, True), (True, sum(LENGTHS) + 9)]
)
def test_a_batch_equals_its_rows_whatever_fills_the_padding(guided, streaming, grad, packed):
    model = listening_student()
    given = conditions(model, LENGTHS)
    switches = {"guided": guided, "streaming": streaming}
    rows = len(LENGTHS)
    x, (t, r) = torch.randn(rows, max(LENGTHS), 12), times(rows)
    for row, length in enumerate(LENGTHS):
        x[row, length:] = torch.nan
        given["prompt"][row, length:] = torch.inf
        given["mu"][row, length:] = torch.nan
    with torch.set_grad_enabled(grad):
        batch = model(x, t, r, model.prepare(**given, **switches, packed=packed))
        for row, length in enumerate(LENGTHS):
            pick = slice(row, row + 1)
            cond = model.prepare(**one_row(given, row), **switches)
            alone = model(x[pick, :length], t[pick], r[pick], cond)
            for branch in range(1 + guided):
                together = batch[branch * rows + row].detach()
                assert relative_rms(together[:length], alone[branch].detach()) <= 1e-5
                assert not together[length:].any()
    if grad:
        batch.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_1_to_3000_frames_equal_themselves_alone(packed):
    model, lengths = listening_student(), [3000, 1, 17, 640, 2, 1250]
    given, x, (t, r) = conditions(model, lengths), torch.randn(6, 3000, 12), times(6)
    with torch.no_grad():
        batch = model(x, t, r, model.prepare(**given, packed=packed))
        for row, length in enumerate(lengths):
            pick = slice(row, row + 1)
            cond = model.prepare(**one_row(given, row))
            alone = model(x[pick, :length], t[pick], r[pick], cond)
            assert relative_rms(batch[row, :length], alone[0]) <= 1e-5


@pytest.mark.parametrize("streaming", [False, True])
def test_agrees_with_the_plain_model_in_float64(streaming):
    model = small_unet().double()
    given = _given(model)
    x, (t, _) = torch.randn(4, 97, 12, dtype=torch.float64), times(4)
    with torch.no_grad():
        got = model(x, t, t, model.prepare(**given, streaming=streaming))
        want = _plain(model, x, t, given, streaming)
    assert relative_rms(got, want) <= 1e-5  # the time embedding is float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("streaming", [False, True])
def test_half_precision_is_as_good_as_the_plain_model(dtype, streaming):
    """At most twice the error of the same weights in plain PyTorch of that dtype."""
    model = small_unet().to(dtype)
    given = _given(model)
    x, (t, r) = torch.randn(4, 97, 12).to(dtype), times(4)
    with torch.no_grad():
        cond = model.prepare(**given, streaming=streaming)
        plain = _plain(model, x, t, given, streaming).double()
        ours = model(x, t, r, cond).double()
        with torch.enable_grad():
            live = model(x, t, r, cond).detach().double()
        exact = copy.deepcopy(model).double()
        truth = _plain(exact, x.double(), t, _cast(given, torch.float64), streaming)
    assert cond["conditions"].dtype == dtype
    assert relative_rms(plain, truth) > 1e-4
    for got in (ours, live):
        assert relative_rms(got, truth) <= 2 * relative_rms(plain, truth)


def _given(model):
    """Conditions in the model's dtype, zero in the padding, which the plain model does not fill."""
    given = conditions(model, LENGTHS)
    inside = torch.arange(max(LENGTHS)) < given["lengths"][:, None]
    for name in ("prompt", "mu"):
        given[name] = given[name].masked_fill(~inside[:, :, None], 0)
    return _cast(given, model.dtype)


def _cast(given, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}


def _plain(model, x, t, given, streaming, weights=None):
    inside = torch.arange(x.shape[1]) < given["lengths"][:, None]
    plain = NaiveUNet(
        model.state_dict() if weights is None else weights,
        model.config.heads,
        model.config.chunk if streaming else None,
    )
    mu, prompt, spks = given["mu"].mT, given["prompt"].mT, given["spks"]
    wide = t.to(torch.promote_types(model.dtype, torch.float32))
    return plain(x.mT, inside[:, None].to(x.dtype), wide, mu, spks, prompt).mT


@pytest.mark.parametrize("streaming", [False, True])
def test_padding_by_the_specs_changes_no_row(streaming):
    model = small_unet()
    cond = model.prepare(**conditions(model, [30, 22]), streaming=streaming)
    padded = {}
    for name, tensor in cond.items():
        spec = cond.specs[name]
        grow = [{"rows": 3, "frames": 20}.get(dim, 0) for dim in spec.dims]
        widths = [width for amount in reversed(grow) for width in (0, amount)]
        padded[name] = pad(tensor, widths, value=spec.pad)
    x, (t, r) = torch.randn(5, 50, 12), times(5)
    with torch.no_grad():
        expected = model(x[:2, :30], t[:2], r[:2], cond)
        got = model(x, t, r, Conditioning(padded, cond.specs))
    assert relative_rms(got[:2, :30], expected) <= 1e-5
    assert got.isfinite().all()


def test_streaming_sees_whole_blocks_and_the_past_only():
    model = small_unet()
    given = conditions(model, [80])
    x, (t, r) = torch.randn(1, 80, 12), times(1)

    def run(x, **switches):
        with torch.no_grad():
            return model(x, t, r, model.prepare(**given, **switches))

    changed = x.clone()
    changed[:, 45] += 1
    before, after = run(x, streaming=True), run(changed, streaming=True)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[:, 40:45], after[:, 40:45])
    assert not torch.equal(run(x)[:, :40], run(changed)[:, :40])


# -- conditions -----------------------------------------------------------------------------------


def test_guided_shares_the_state_and_drops_the_conditions():
    model = small_unet()
    given = conditions(model, [30, 22])
    x, (t, r) = torch.randn(2, 30, 12), times(2)
    with torch.no_grad():
        both = model(x, t, r, model.prepare(**given, guided=True))
        assert both.shape == (4, 30, 12)
        assert relative_rms(both[:2], model(x, t, r, model.prepare(**given))) <= 1e-5
        nothing = {k: v if k == "lengths" else torch.zeros_like(v) for k, v in given.items()}
        assert relative_rms(both[2:], model(x, t, r, model.prepare(**nothing))) <= 1e-5


@pytest.mark.parametrize("streaming", [False, True])
def test_conditioning_is_what_it_declares(streaming):
    model = small_unet()
    inputs = {
        name: torch.full(spec.shape(rows=2, frames=9), spec.pad, dtype=spec.dtype)
        for name, spec in model.inputs.items()
    }
    padded = model.prepare(**inputs, guided=True, streaming=streaming)
    packed = model.prepare(**inputs, guided=True, packed=5)
    assert padded.keys() | packed.keys() == model.specs.keys() - (set() if streaming else {"chunk"})
    for name, tensor in (*padded.items(), *packed.items()):
        spec = model.specs[name]
        assert tensor.shape == spec.shape(rows=4, frames=9, total=10)
        assert tensor.dtype == (spec.dtype or model.dtype)
        assert tensor.isfinite().all()


def wrong_prepares():
    given = conditions(small_unet(), [9, 5])
    yield given | {"mu": given["mu"][:, :4]}, "mu: expected shape"
    yield given | {"spks": given["mu"]}, "spks: expected shape"
    yield given | {"prompt": given["prompt"][..., :3]}, "prompt: expected shape"
    yield given | {"prompt": given["prompt"].long()}, "prompt: expected torch.float32"
    yield given | {"lengths": torch.tensor([9, 10])}, r"lengths: expected values in \[1, 9\]"
    yield given | {"lengths": torch.tensor([9])}, r"lengths: expected shape \(2,\)"
    yield given | {"packed": 13}, "packed: expected no fewer frames"


@pytest.mark.parametrize(("given", "message"), list(wrong_prepares()))
def test_wrong_conditions_are_named(given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        small_unet().prepare(**given)


def test_what_does_not_fit_a_conditioning_is_refused():
    model = small_unet()
    cond = model.prepare(**conditions(model, [9, 5]), guided=True)
    t = torch.zeros(3)
    with pytest.raises(ValueError, match="x: expected 4 rows"):
        model(torch.zeros(3, 9, 12), t, t, cond)
    with pytest.raises(ValueError, match=r"x: expected shape \(2, 9, 12\)"):
        model(torch.zeros(2, 8, 12), t[:2], t[:2], cond)
    with pytest.raises(ValueError, match=r"t: expected shape \(2,\)"):
        model(torch.zeros(2, 9, 12), t, t[:2], cond)


# -- state dicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "estimator.", "decoder.estimator."])
@pytest.mark.parametrize("switches", [{}, {"ff_mult": 2}, {"mid_blocks": 1, "depth": 3}])
def test_state_dicts_carry_their_sizes_under_any_prefix(prefix, switches):
    model = small_unet(**switches, chunk=50)
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    if prefix:
        state["encoder.weight"] = torch.ones(1)
    loaded = CausalUNet.from_state_dict(state, heads=2)
    assert loaded.config == model.config
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_a_missing_mixer_loads_as_the_identity_and_a_trained_one_as_itself():
    teacher = small_unet()
    asked = CausalUNet.from_state_dict(teacher.state_dict(), heads=2, mixer=True)
    assert torch.equal(asked.time_embed_mixer.weight, torch.eye(48, 96))
    student = listening_student()
    again = CausalUNet.from_state_dict(student.state_dict(), heads=2)
    assert torch.equal(again.time_embed_mixer.weight, student.time_embed_mixer.weight)
    assert torch.equal(teacher.student(0.5).time_embed_mixer.weight, 0.5 * torch.eye(48, 96))


def wrong_loads():
    state = small_unet().state_dict()

    def without(part):
        return {k: v for k, v in state.items() if part not in k}

    yield without("to_q"), "state_dict: expected the key 'down_blocks.0.1.0.attn1.to_q"
    yield without("final_proj"), "state_dict: expected the key 'final_proj.weight'"
    yield without("time_mlp"), "state_dict: expected the key 'time_mlp.linear_1.weight'"
    yield without("mid_blocks"), "mid_blocks: expected an integer >= 1, got 0"
    few = without("mid_blocks.1.0.block2.block.2")
    yield few, r"missing 2 \(mid_blocks.1.0.block2.block.2.weight, .*bias\), unexpected 0"
    yield state | {"surplus.weight": torch.ones(1)}, r"missing 0, unexpected 1 \(surplus.weight\)"
    wide, name = torch.zeros(32, 40, 3), "up_blocks.0.0.block1.block.0.weight"
    yield state | {name: wide}, rf"{name}: expected shape \(32, 64, 3\), got \(32, 40, 3\)"
    yield (
        state | {"final_proj.weight": wide[0]},
        r"final_proj.weight: expected 3 dim.*got \(40, 3\)",
    )
    yield state | {"final_proj.bias": torch.ones(12).long()}, "final_proj.bias: .*torch.int64"
    yield state | {"final_proj.bias": torch.ones(12) / 0}, "final_proj.bias: .*finite.* 12 that"
    yield state | {"final_proj.bias": None}, "final_proj.bias: expected a tensor, got NoneType"
    yield state | {f"other.{k}": v for k, v in state.items()}, "under one prefix, got 2 .*such keys"
    blocks = {f"mid_blocks.{i}.surplus": torch.ones(1) for i in range(2, 1000)}
    yield state | blocks, "expected at least 16032 keys for 2004 blocks"


@pytest.mark.parametrize(("state", "message"), list(wrong_loads()))
def test_what_does_not_load_says_why(state, message):
    with pytest.raises(ValueError, match=message):
        CausalUNet.from_state_dict(state, heads=2)


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="depth: expected an integer >= 1, got 0"):
        CausalUNetConfig(depth=0)


# -- students -------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
def test_student_equals_the_conditional_teacher_bit_for_bit(grad):
    teacher = small_unet()
    student = teacher.student().eval()
    given = conditions(teacher, LENGTHS)
    x, (t, r) = torch.randn(4, 97, 12), times(4)
    with torch.set_grad_enabled(grad):
        expected = teacher(x, t, t, teacher.prepare(**given))
        for end in (t, r, torch.ones(4)):
            assert torch.equal(student(x, t, end, student.prepare(**given)), expected)


def test_student_follows_r_once_its_mixer_is_trained():
    student = small_unet().student()
    assert student.training
    given = conditions(student, [20])
    x, t = torch.randn(1, 20, 12), torch.tensor([0.2])
    student(x, t, torch.tensor([0.7]), student.prepare(**given)).square().sum().backward()
    assert all(p.grad is not None for p in student.parameters())
    mixer = student.time_embed_mixer.weight
    assert mixer.grad[:, 48:].abs().sum() > 0
    with torch.no_grad():
        mixer -= 0.1 * mixer.grad.sign()
        near, far = (student(x, t, torch.tensor([r]), student.prepare(**given)) for r in (0.3, 0.9))
    assert not torch.equal(near, far)


def test_gradients_are_those_of_the_plain_model():
    model = small_unet()
    given = _given(model)
    x, (t, _) = torch.randn(4, 97, 12), times(4)
    model(x, t, t, model.prepare(**given, streaming=True)).square().sum().backward()
    weights = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    _plain(model, x, t, given, True, weights).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert relative_rms(parameter.grad, weights[name].grad) <= 1e-4, name


def test_checkpointed_activations_change_no_gradient():
    model = small_unet().student()
    given = conditions(model, [30, 22])
    x, (t, r) = torch.randn(2, 30, 12), times(2)

    def gradients():
        model.zero_grad()
        model(x, t, r, model.prepare(**given)).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    model.checkpoint_activations = True
    for got, want in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_gradients_reach_every_parameter_under_autocast():
    model = small_unet()
    given = conditions(model, [24, 17])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v = model(torch.randn(2, 24, 12), *times(2), model.prepare(**given, guided=True))
    v.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_time_stays_in_float32_under_autocast_and_in_half_precision():
    student = listening_student()
    t, r = times(3)
    with torch.no_grad():
        plain = student.embed_time(t, r)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(student.embed_time(t, r), plain)
        half = student.bfloat16()
        assert half.embed_time(t, r).dtype == torch.float32
        given = conditions(half, [40])
        mel = sample(half, torch.randn(1, 40, 12), half.prepare(**given), grids.uniform(2))
    assert mel.dtype == torch.float32


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="no triton")
def test_kernels_and_reference_agree():
    model = small_unet(dim=16, heads=1, mid_blocks=1, depth=1).student()
    given = conditions(model, [30, 22])
    x, (t, r) = torch.randn(2, 30, 12), times(2)
    results = []
    for name in ("triton", "reference"):
        model.zero_grad()
        with backend(name):
            v = model(x, t, r, model.prepare(**given, streaming=True))
            v.square().sum().backward()
        results.append([v.detach(), *(p.grad for p in model.parameters())])
    for got, want in zip(*results, strict=True):
        assert relative_rms(got, want) <= 1e-4


@pytest.mark.parametrize("packed", [False, 60])
def test_compiles_without_graph_breaks(packed):
    torch._dynamo.reset()
    model = listening_student(mid_blocks=1, depth=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for frames in (24, 31):
        given = conditions(model, [frames, frames - 5])
        x, (t, r) = torch.randn(2, frames, 12), times(2)
        with torch.no_grad():
            cond = model.prepare(**given, guided=True, streaming=True, packed=packed)
            torch.testing.assert_close(compiled(x, t, r, cond), model(x, t, r, cond))


# -- step tables ----------------------------------------------------------------------------------


@pytest.mark.parametrize("w", [None, 2.5])
@pytest.mark.parametrize("nfe", [1, 2, 3, 4])
def test_tables_solve_as_the_live_model_does(nfe, w):
    student = listening_student()
    cond = student.prepare(**conditions(student, [40, 23]), guided=w is not None)
    noise, grid = torch.randn(2, 40, 12), grids.sway(nfe)
    tables = student.tables(grid[:-1], grid[1:])
    assert tables.blocks.shape == (nfe, 1, 4, 32)
    assert tables.final.shape == (nfe, 1, 0, 32)
    assert tables.blocks.dtype == torch.float32
    expected = sample(student, noise, cond, grid, guidance=w, grad=True).detach()
    with torch.no_grad():
        got = solver.euler(
            lambda k, state: student.evaluate(state, tables.at(k), cond),
            noise,
            grid.diff()[:, None].expand(-1, 2),
            w,
            lengths=cond["lengths"][:2],
        ).x
    assert relative_rms(got, expected) <= 1e-5


def test_rows_may_have_their_own_times():
    student = listening_student()
    cond = student.prepare(**conditions(student, [40, 23]))
    x = torch.randn(2, 40, 12)
    t, r = torch.tensor([[0.0, 0.2], [0.3, 0.4]]), torch.tensor([[0.3, 0.4], [1.0, 0.9]])
    tables = student.tables(t, r)
    assert tables.blocks.shape == (2, 2, 4, 32)
    for k in range(2):
        expected = student(x, t[k], r[k], cond).detach()
        with torch.no_grad():
            assert relative_rms(student.evaluate(x, tables.at(k), cond), expected) <= 1e-5


def test_half_precision_tables_are_as_good_as_the_weights():
    grid = grids.uniform(3)
    half = listening_student().bfloat16()
    tables = half.tables(grid[:-1], grid[1:])
    assert tables.blocks.dtype == torch.float32
    exact = half.float().tables(grid[:-1], grid[1:])
    assert relative_rms(tables.blocks, exact.blocks) <= 1e-6


def test_weights_are_fused_where_they_lie():
    student = listening_student()
    before = copy.deepcopy(student.state_dict())
    grid = grids.uniform(2)

    def tables() -> StepTables:
        return student.tables(grid[:-1], grid[1:])

    student.fuse_weights()
    attn = student.mid_blocks[0][1][0].attn1
    whole, no_bias = attn._fused.whole
    assert no_bias is None
    assert attn.to_q.weight.data_ptr() == whole.data_ptr()
    assert torch.equal(whole, torch.cat([attn.to_q.weight, attn.to_k.weight, attn.to_v.weight]))
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name])
    first = tables().blocks
    with torch.no_grad():
        student.up_blocks[0].resnet.mlp[1].bias += 1
    torch.testing.assert_close(tables().blocks[:, :, -1], first[:, :, -1] + 1)
    torch.testing.assert_close(tables().blocks[:, :, :-1], first[:, :, :-1])
    assert len(student.table_sources()) == 4 + 1 + 2 * 4


# -- graphs ---------------------------------------------------------------------------------------


@pytest.fixture(params=["graphs", "eager"])
def either(request, monkeypatch):
    """The machinery of graphs, and what a machine without CUDA runs."""
    if request.param == "graphs":
        monkeypatch.setattr("imf_kernels.graphs.runtime.slot_on", TapeSlot)
    return request.param


@pytest.mark.parametrize("w", [None, 2.5])
@pytest.mark.parametrize(
    ("streaming", "buckets"),
    [
        (False, [(2, 48), (4, 40)]),
        (True, [(2, 48), (4, 40)]),
        (False, [(2, 80, 48), (4, 99, 40)]),
    ],
)
def test_graph_sampler(either, w, streaming, buckets):
    model = listening_student()
    options, packed = {"streaming": streaming}, len(buckets[0]) == 3
    with GraphSampler(model, 2, buckets, w, prepare=options) as sampler:
        for seed, lengths in enumerate([[20], [48, 31], [7, 40, 33], [1]]):
            given = conditions(model, lengths, seed)
            x = torch.randn(len(lengths), max(lengths), 12)
            cond = model.prepare(**given, guided=w is not None, packed=packed, **options)
            for grid in ("uniform", "sway"):
                want = sample(model, x, cond, grid, nfe=2, guidance=w)
                assert relative_rms(sampler.sample(x, cond, grid), want) <= 1e-5
                assert relative_rms(sampler.sample(x, grid=grid, conditions=given), want) <= 1e-5
        rows = {k: v if k == "lengths" else list(v) for k, v in given.items()}
        rows.pop("lengths")
        ragged = sampler.sample(list(x), conditions=rows)
        assert relative_rms(ragged[0], sample(model, x, cond, nfe=2, guidance=w)[0]) <= 1e-5
        stats = sampler.stats()
    assert not stats.fallbacks
    assert (stats.hits, stats.eager) == ((17, 0) if either == "graphs" else (0, 17))


def test_graph_sampler_notices_weights_behind_its_tables(either):
    model = listening_student()
    given = conditions(model, [20])
    x, cond = torch.randn(1, 20, 12), model.prepare(**given)
    with GraphSampler(model, 2, [(1, 24)]) as sampler:
        sampler.sample(x, cond)
        with torch.no_grad():
            model.mid_blocks[0].resnet.mlp[1].weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"Call refresh\(\)"):
            sampler.sample(x, cond)
        sampler.refresh()
        assert relative_rms(sampler.sample(x, cond), sample(model, x, cond, nfe=2)) <= 1e-5


def test_graph_teacher(either):
    model = small_unet()
    given = conditions(model, [20, 13])
    z, t, r = torch.randn(2, 20, 12), torch.tensor([0.1, 0.5]), torch.tensor([0.4, 1.0])
    with GraphTeacher(model, 2.0, [(2, 24)]) as graphs:
        cond = graphs.prepare(**given)
        got = graphs.integrate(z, t, r, 3, cond)
    want = Teacher(model, 2.0).integrate(z, t, r, 3, cond)
    assert relative_rms(got.displacement, want.displacement) <= 1e-5
