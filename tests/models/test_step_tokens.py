"""DiTs that are told their step count by tokens, the teacher's modulations in their weights."""

import math

import pytest
import torch

from imf_kernels import Batch, DSFlow, Teacher, o3s, sampler
from imf_kernels.graphs import GraphSampler
from imf_kernels.models import DiT, DiTConfig, StepTables, StepTokenDiT, TextConfig, save_student
from imf_kernels.models.positions import Rope
from imf_kernels.models.scope import Whole
from imf_kernels.streaming import Streams
from tests.graphs.tape import TapeSlot
from tests.models.test_cosyvoice2 import small_unet
from tests.models.tools import VARIANTS, conditions, one_row, relative_rms, small_model
from tests.objectives.tools import seeded

LENGTHS = [9, 6]


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def student(variant, tokens=2, **switches):
    torch.manual_seed(0)
    return StepTokenDiT.of(small_model(variant, **switches), tokens=tokens).eval()


def noise(rows=2, frames=9, dtype=torch.float32):
    return torch.randn(rows, frames, 12, generator=seeded(3), dtype=dtype)


@torch.no_grad()
def velocity(model, given, x=None, t=0.3, **options):
    x = noise(*given["prompt"].shape[:2], given["prompt"].dtype) if x is None else x
    t = torch.full((len(x),), t)
    return model(x, t, t, model.prepare(**given, **options))


def at_one_time(model, given, time, **options):
    """Of the modulations of one row, in float64: in a batch, and added to 1, they are rounded."""
    t = torch.full((1,), time)
    x = noise(*given["prompt"].shape[:2], given["prompt"].dtype)
    with torch.no_grad():
        blocks, final = (table.double() for table in model.tables(t, t))
        made = StepTables(blocks, final).at(0)
        return model.evaluate(x, made, model.prepare(**given, **options))


class Unheard(StepTokenDiT):
    """Without its tokens."""

    def velocity(self, x, conditions, modulation, rows, cond):
        scope = Whole(rows)
        h = self.embed_frames(x, conditions, scope)
        return self.proj_out(self.run_blocks(h, modulation, Rope(cond["rope"], rows), scope))


@pytest.mark.parametrize("switches", [{}, {"long_skip": True, "qk_norm": True}])
@pytest.mark.parametrize("time", [0.5, 0.2])
def test_without_tokens_it_is_the_teacher_at_that_time(variant, switches, time):
    teacher = small_model(variant, **switches).double()
    given = {
        name: value.double() if value.is_floating_point() else value
        for name, value in conditions(teacher, LENGTHS).items()
    }
    folded = Unheard.of(teacher, time=time).eval()
    for options in ({}, {"guided": True}, {"packed": True}):
        want = at_one_time(teacher, given, time, **options)
        got = velocity(folded, given, t=0.9, steps=2, **options)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert relative_rms(velocity(teacher, given, t=0.9), want[:2]) > 1e-3
    spoken = velocity(StepTokenDiT.of(teacher, time=time), given, steps=2)
    assert relative_rms(spoken, want[:2]) > 1e-3


def test_of_float32_and_of_a_student():
    teacher = small_model("f5_v1").student().eval()
    given = conditions(teacher, LENGTHS)
    want = velocity(teacher, given, t=0.5)
    torch.testing.assert_close(
        velocity(Unheard.of(teacher).eval(), given, steps=1), want, rtol=1e-4, atol=1e-5
    )


def test_nothing_of_time_is_left(variant):
    model = student(variant)
    names = set(dict(model.named_parameters()))
    gone = set(dict(small_model(variant).named_parameters())) - names
    assert {name.split(".")[-2] for name in gone} <= {"0", "2", "linear"}
    assert not [name for name in names if "time" in name or "norm.linear" in name]
    assert names - set(dict(small_model(variant).named_parameters())) == {"step_tokens"}
    given = conditions(model, LENGTHS)
    assert torch.equal(
        velocity(model, given, t=0.1, steps=2), velocity(model, given, t=0.8, steps=2)
    )


def test_the_step_count_matters(variant):
    model = student(variant)
    given = conditions(model, LENGTHS)
    answers = [velocity(model, given, steps=k) for k in (1, 2, 4)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert relative_rms(answers[one], answers[other]) > 1e-3


@pytest.mark.parametrize("packed", [False, True, 20])
@pytest.mark.parametrize("guided", [False, True])
def test_a_batch_equals_its_rows(variant, packed, guided):
    model = student(variant)
    given = conditions(model, LENGTHS)
    dirty = noise()
    dirty[1, 6:] = torch.nan
    got = velocity(model, given, dirty, steps=2, packed=packed, guided=guided)
    for row, length in enumerate(LENGTHS):
        x = noise()[row : row + 1, :length]
        want = velocity(model, one_row(given, row), x, steps=2, guided=guided)
        for branch, alone in enumerate(want):
            here = got[2 * branch + row]
            torch.testing.assert_close(here[:length], alone, rtol=1e-4, atol=1e-5)
            assert not here[length:].any()


def test_tokens_stand_in_front_of_the_row_and_do_not_turn():
    """Against attention spelled out: one block, by hand."""
    model = student("f5_v1", tokens=3, depth=1)
    given = one_row(conditions(model, [6, 6]), 0)
    cond = model.prepare(**given, steps=4)
    x = noise(1, 6)
    with torch.no_grad():
        rows = Whole(_rows(6))
        h = model.embed_frames(x[0], cond["conditions"], rows)
        h = torch.cat([model.step_tokens[2], h])
        block = model.transformer_blocks[0]
        y = torch.nn.functional.layer_norm(h, h.shape[1:], eps=1e-6)
        q, k, v = (
            layer(y).unflatten(1, (model.config.heads, -1))
            for layer in (block.attn.to_q, block.attn.to_k, block.attn.to_v)
        )
        q, k = (_turned(part, torch.tensor([0, 0, 0, 0, 1, 2, 3, 4, 5])) for part in (q, k))
        weights = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        attended = torch.einsum("hqk,khd->qhd", weights.softmax(-1), v).flatten(1)
        h = h + block.attn.to_out[0](attended)
        h = h + block.ff.ff(torch.nn.functional.layer_norm(h, h.shape[1:], eps=1e-6))
        y = torch.nn.functional.layer_norm(h, h.shape[1:], eps=1e-6)
        want = model.proj_out(y)[3:]
        got = velocity(model, given, x, steps=4)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def _rows(frames):
    from imf_kernels.rows import Rows

    return Rows.padded(torch.tensor([frames]), frames)


def _turned(x, position):
    frequencies = 1e4 ** -(torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turn = torch.polar(torch.ones(1), torch.outer(position.float(), frequencies))[:, None]
    return torch.view_as_real(pairs * turn).flatten(-2)


def test_told_guidance_and_steps():
    model = StepTokenDiT.of(small_model("cosyvoice3").student(guidance=True)).eval()
    torch.nn.init.normal_(model.guidance_embed.mlp[2].weight)
    given = conditions(model, LENGTHS)
    one, other = (velocity(model, given, steps=1, guidance=w) for w in (1.0, 2.0))
    assert relative_rms(one, other) > 1e-3


# -- through the house ----------------------------------------------------------------------------


def test_gradients_reach_the_tokens_of_that_count(variant):
    model = student(variant).train()
    model.checkpoint_activations = True
    given = conditions(model, LENGTHS)
    t = torch.zeros(2)
    model(noise(), t, t, model.prepare(**given, steps=2)).square().mean().backward()
    reached = model.step_tokens.grad.abs().amax((1, 2))
    assert reached[1] > 0
    assert not reached[0]
    assert not reached[2]
    assert all(p.grad is not None for p in model.parameters())


def test_dsflow_trains_it():
    """On the teacher's own endpoints, down from what the folded teacher does."""
    model = small_model("cosyvoice3", depth=1)
    objective = DSFlow(Teacher(model), nfe=4, steps="steps", generator=seeded())
    learner = StepTokenDiT.of(model)
    learner.input_embed.requires_grad_(False)
    given = conditions(model, [6] * 8)
    lengths = given.pop("lengths")
    material = Batch(noise(8, 6), lengths, given)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    endpoints = []
    for _ in range(45):
        optimizer.zero_grad()
        loss, info = objective(learner, material)
        loss.backward()
        optimizer.step()
        endpoints.append(float(info["endpoint"]))
    for count in range(3):
        first, last = endpoints[count::3][:2], endpoints[count::3][-2:]
        assert sum(last) < 0.5 * sum(first)


@pytest.mark.parametrize("buckets", [[(4, 16)], [(4, 40, 16)]])
@pytest.mark.parametrize("guidance", [None, 1.5])
def test_through_graphs(monkeypatch, buckets, guidance):
    monkeypatch.setattr("imf_kernels.graphs.runtime.slot_on", TapeSlot)
    model = student("f5_v0")
    service = GraphSampler(model, 2, buckets, guidance, prepare={"steps": 2})
    for lengths in (LENGTHS, [16], [3, 8, 5]):
        given = conditions(model, lengths)
        x = noise(len(lengths), max(lengths))
        cond = model.prepare(**given, steps=2, guided=guidance is not None)
        want = sampler.sample(model, x, cond, nfe=2, guidance=guidance)
        assert relative_rms(service.sample(x, conditions=given), want) <= 1e-5
        if len(buckets[0]) == 2:
            assert relative_rms(service.sample(x, cond), want) <= 1e-5
    assert not service.stats().fallbacks
    assert service.stats().hits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded(tmp_path, variant, dtype):
    model = student(variant, tokens=3).to(dtype)
    model.save(tmp_path / "student.safetensors")
    loaded = StepTokenDiT.load(tmp_path / "student.safetensors")
    assert (loaded.counts, loaded.tokens, loaded.dtype) == ((1, 2, 4), 3, dtype)
    assert not loaded.training
    given = conditions(model, LENGTHS)
    assert torch.equal(velocity(loaded, given, steps=4), velocity(model, given, steps=4))


def test_files_of_others_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors: kind: expected one of step_token"):
        StepTokenDiT.load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"path: expected a file \.safetensors"):
        student("f5_v1").save(tmp_path / "student.pt")
    with pytest.raises(TypeError, match="student: expected a DiT or a CausalUNet, got StepToken"):
        save_student(student("f5_v1"), tmp_path / "student.pt")


def test_grids_of_another_number_of_steps_are_refused(tmp_path):
    model = student("cosyvoice3", depth=1)
    given = conditions(model, LENGTHS)
    lengths = given.pop("lengths")
    told = {"higher_is_better": False, "folder": tmp_path, "name": "size", "budget": 2}

    def find(model, nfe, **steps):
        batches = [Batch(noise(), lengths, given | steps)]
        return o3s.find_grid(model, batches, lambda x, _: float(x.abs().mean()), nfe, **told)

    assert len(find(model, 2, steps=2).best.grid) == 3
    service = GraphSampler(model, 4, prepare={"steps": 4})
    for held, nfe, steps in ((model, 4, {"steps": 2}), (model, 2, {}), (service, 4, {"steps": 2})):
        with pytest.raises(ValueError, match=f"batches: expected conditions with steps {nfe} "):
            find(held, nfe, **steps)
    for options in ({}, {"prepare": {"steps": 2}}):
        with pytest.raises(ValueError, match="prepare: expected steps 4 for this model and nfe 4"):
            GraphSampler(model, 4, **options)


def test_refusals():
    model = student("cosyvoice3")
    given = conditions(model, LENGTHS)
    for steps in (None, 3):
        with pytest.raises(ValueError, match="steps: expected one of 1, 2, 4, got"):
            model.prepare(**given, steps=steps)
    for name in ("streaming", "upstream_padding"):
        with pytest.raises(ValueError, match=f"{name}: expected False for a model with step"):
            model.prepare(**given, steps=1, **{name: True})
    for made in (model.student, model.baked, model.fp8, lambda: Streams(model, nfe=2, frames=9)):
        with pytest.raises(ValueError, match="model: expected one with"):
            made()
    with pytest.raises(TypeError, match="model: expected a DiT, got CausalUNet"):
        StepTokenDiT.of(small_unet())
    with pytest.raises(ValueError, match="model: expected one with time conditioning"):
        StepTokenDiT.of(model)
    teacher = small_model("cosyvoice3")
    for options, message in [
        ({"time": 1.5}, r"time: expected a finite number in \[0, 1\], got 1.5"),
        ({"counts": ()}, r"counts: expected different step counts, got \(\)"),
        ({"counts": (1, 1)}, "counts: expected different step counts"),
        ({"counts": (0,)}, "counts: expected an integer >= 1, got 0"),
        ({"tokens": 0}, "tokens: expected an integer >= 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            StepTokenDiT.of(teacher, **options)


@pytest.mark.parametrize(
    ("variant", "sizes", "before"),
    [
        ("f5_v1", {"dim": 1024, "depth": 22, "heads": 16}, 337_096_804),
        ("f5_v1", {"dim": 768, "depth": 18, "heads": 12}, 159_228_772),
        ("cosyvoice3", {"dim": 1024, "depth": 22, "heads": 16}, 331_142_224),
    ],
)
def test_parameters_before_and_after(variant, sizes, before):
    text = None if variant == "cosyvoice3" else TextConfig(vocab=2545)
    config = DiTConfig.for_variant(variant, text=text, **sizes)

    def count(model):
        return sum(p.numel() for p in model.parameters())

    with torch.device("meta"):
        teacher = DiT(config)
        step = StepTokenDiT(DiTConfig.for_variant(variant, text=text, baked=True, **sizes))
    dim, depth = sizes["dim"], sizes["depth"]
    adaln = (6 * depth + 2) * dim * (dim + 1)
    time_mlp = 256 * dim + dim + dim * (dim + 1)
    assert count(teacher) == before
    assert count(step) == before - adaln - time_mlp + 3 * dim
