import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from imf_kernels import grids, solver
from imf_kernels.models import DiT, DiTConfig, StepTables
from imf_kernels.models.step_tables import linear_float32
from imf_kernels.sampler import sample
from tests.models.tools import VARIANTS, conditions, relative_rms, small_model

LENGTHS = [40, 23]


@pytest.fixture(params=VARIANTS)
def student(request):
    """With a mixer that listens to r."""
    student = small_model(request.param).student().eval()
    with torch.no_grad():
        student.time_embed_mixer.weight += 0.1 * torch.randn_like(student.time_embed_mixer.weight)
    return student


def tables_of(model, grid) -> StepTables:
    return model.tables(grid[:-1], grid[1:])


def solve(model, noise, cond, grid, tables, guidance=None):
    return solver.euler(
        lambda k, state: model.evaluate(state, tables.at(k), cond),
        noise,
        grid.diff()[:, None].expand(-1, len(noise)),
        guidance,
        lengths=cond["lengths"][: len(noise)],
        model_dtype=model.dtype,
    ).x


@pytest.mark.parametrize("guidance", [None, 2.5])
@pytest.mark.parametrize("nfe", range(1, 9))
def test_tables_solve_as_the_live_model_does(student, nfe, guidance):
    cond = student.prepare(**conditions(student, LENGTHS), guided=guidance is not None)
    noise, grid = torch.randn(2, 40, 12), grids.sway(nfe)
    expected = sample(student, noise, cond, grid, guidance=guidance, grad=True)
    with torch.no_grad():
        tables = tables_of(student, grid)
        assert tables.blocks.shape == (nfe, 1, 2, 6, 32)
        assert tables.final.shape == (nfe, 1, 2, 32)
        assert tables.blocks.dtype == tables.final.dtype == torch.float32
        got = solve(student, noise, cond, grid, tables, guidance)
        baked = student.baked()
        assert torch.equal(solve(baked, noise, cond, grid, tables, guidance), got)
    assert relative_rms(got, expected) <= 1e-5


def test_rows_may_have_their_own_times(student):
    cond = student.prepare(**conditions(student, LENGTHS))
    x = torch.randn(2, 40, 12)
    t, r = torch.tensor([[0.0, 0.2], [0.3, 0.4]]), torch.tensor([[0.3, 0.4], [1.0, 0.9]])
    with torch.no_grad():
        tables = student.tables(t, r)
        assert tables.blocks.shape == (2, 2, 2, 6, 32)
        for k in range(2):
            with torch.enable_grad():
                expected = student(x, t[k], r[k], cond)
            assert relative_rms(student.evaluate(x, tables.at(k), cond), expected) <= 1e-5


def test_a_baked_model_lacks_what_the_tables_hold(student):
    baked = student.baked()
    left_out = {k for k in student.state_dict() if k not in baked.state_dict()}
    assert left_out
    assert all("time_embed" in k or "attn_norm" in k or "norm_out" in k for k in left_out)
    cond = baked.prepare(**conditions(baked, LENGTHS))
    with pytest.raises(RuntimeError, match="baked"):
        baked(torch.randn(2, 40, 12), torch.zeros(2), torch.ones(2), cond)


def test_cosyvoice3_keeps_59_percent_of_its_weights():
    config = DiTConfig.for_variant("cosyvoice3", dim=1024, depth=22, heads=16)
    with torch.device("meta"):
        model = DiT(config)
        baked = DiT(DiTConfig(**{**vars(config), "baked": True}))
    whole, kept = (sum(p.numel() for p in m.parameters()) for m in (model, baked))
    assert whole == pytest.approx(331.1e6, rel=0.01)
    assert kept / whole < 0.6


class TestFusedStorage:
    def test_parameters_keep_their_names_and_lie_in_it(self, student):
        names = list(student.state_dict())
        before = copy.deepcopy(student.state_dict())
        student.fuse_weights()
        weight, bias = student._fused_adaln.whole
        student.fuse_weights()
        assert student._fused_adaln.whole[0] is weight, "the second call copies nothing"
        assert list(student.state_dict()) == names
        for name, value in student.state_dict().items():
            assert torch.equal(value, before[name])
        first = student.transformer_blocks[0].attn_norm.linear
        assert first.weight.data_ptr() == weight.data_ptr()
        assert first.bias.data_ptr() == bias.data_ptr()
        attn = student.transformer_blocks[1].attn
        whole = attn._fused.whole[0]
        assert torch.equal(whole, torch.cat([attn.to_q.weight, attn.to_k.weight, attn.to_v.weight]))
        assert attn.to_q.weight.data_ptr() == whole.data_ptr()

    def test_in_place_updates_are_seen(self, student):
        grid = grids.uniform(2)
        before = tables_of(student, grid)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        for parameter in student.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        after = tables_of(student, grid)
        assert not torch.equal(before.blocks, after.blocks)
        fresh = DiT(student.config)
        fresh.load_state_dict(student.state_dict())
        assert torch.equal(tables_of(fresh, grid).blocks, after.blocks)

    @pytest.mark.parametrize("change", ["cast", "copy", "assign", "one layer"])
    def test_is_made_anew_where_parameters_have_left_it(self, student, change):
        grid = grids.uniform(2)
        student.fuse_weights()
        if change == "cast":
            student = student.double().float()
        elif change == "copy":
            student = copy.deepcopy(student)
        elif change == "assign":
            state = {k: v + 0.1 for k, v in student.state_dict().items()}
            student.load_state_dict(state, assign=True)
        else:
            layer = student.transformer_blocks[1].attn_norm.linear
            layer.weight = torch.nn.Parameter(layer.weight + 1)
        fresh = DiT(student.config)
        fresh.load_state_dict(student.state_dict())
        assert torch.equal(tables_of(student, grid).blocks, tables_of(fresh, grid).blocks)
        with torch.no_grad():
            student.transformer_blocks[0].attn_norm.linear.bias += 1
            fresh.transformer_blocks[0].attn_norm.linear.bias += 1
        assert torch.equal(tables_of(student, grid).blocks, tables_of(fresh, grid).blocks)

    def test_a_state_dict_still_saves(self, student, tmp_path):
        student.fuse_weights()
        save_file(student.state_dict(), tmp_path / "student.safetensors")
        fresh = DiT(student.config)
        fresh.load_state_dict(load_file(tmp_path / "student.safetensors"))
        for name, value in student.state_dict().items():
            assert torch.equal(fresh.state_dict()[name], value)

    def test_training_goes_on(self, student):
        student.fuse_weights()
        cond = student.prepare(**conditions(student, LENGTHS))
        x = torch.randn(2, 40, 12)
        student(x, torch.zeros(2), torch.ones(2), cond).square().sum().backward()
        assert all(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_linear_float32_keeps_float32_inputs(dtype):
    x, weight, bias = (
        torch.randn(3, 64),
        torch.randn(1000, 64).to(dtype),
        torch.randn(1000).to(dtype),
    )
    got = linear_float32(x, weight, bias)
    assert got.dtype == torch.float32
    exact = x.double() @ weight.double().T + bias.double()
    assert relative_rms(got.double(), exact) <= 1e-6


def test_half_precision_tables_are_as_good_as_the_weights(student):
    grid = grids.uniform(3)
    half = copy.deepcopy(student).bfloat16()
    tables = tables_of(half, grid)
    assert tables.blocks.dtype == torch.float32
    exact = tables_of(half.float(), grid)
    assert relative_rms(tables.blocks, exact.blocks) <= 1e-6
