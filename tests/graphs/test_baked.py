import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from imf_kernels import fp8, grids, sampler
from imf_kernels.graphs import GraphSampler, bake
from imf_kernels.models import Baked, CausalUNet, CausalUNetConfig
from tests.models.tools import VARIANTS, conditions, relative_rms, small_model

BUCKETS = [(2, 32)]
GRIDS = ([0.0, 0.2, 1.0], "sway", [0.0, 0.7, 1.0])


@pytest.fixture(params=VARIANTS)
def student(request):
    return small_model(request.param).student().eval()


def request_of(model):
    return torch.randn(2, 30, 12), conditions(model, [30, 22])


@pytest.mark.parametrize("nfe", range(1, 9))
def test_solves_as_the_student_does(either, student, nfe):
    schedules = ["uniform", "sway"] if nfe > 1 else ["uniform"]
    baked = bake(student, schedules, nfe, buckets=BUCKETS)
    x, given = request_of(student)
    for grid in schedules:
        want = sampler.sample(student, x, student.prepare(**given), grid, nfe=nfe)
        baked.set_grid(grid)
        assert relative_rms(baked.sample(x, conditions=given), want) <= 1e-5
        assert relative_rms(baked.sample(x, grid=grid, conditions=given), want) <= 1e-5


def test_a_guided_teacher_bakes_too(either):
    teacher = small_model("f5_v1")
    baked = bake(teacher, ["sway"], 4, guidance=2.0, buckets=BUCKETS)
    x, given = request_of(teacher)
    cond = teacher.prepare(**given, guided=True)
    want = sampler.sample(teacher, x, cond, "sway", nfe=4, guidance=2.0)
    assert relative_rms(baked.sample(x, conditions=given), want) <= 1e-5


def test_other_grids_are_refused(either, student):
    baked = bake(student, GRIDS, 2, buckets=BUCKETS)
    x, given = request_of(student)
    with pytest.raises(ValueError, match="grid: expected one of the 3 baked grids"):
        baked.set_grid("uniform")
    with pytest.raises(ValueError, match="baked grids"):
        baked.sample(x, grid=[0.0, 0.5, 1.0], conditions=given)


def test_is_a_snapshot(either, student):
    x, given = request_of(student)
    baked = bake(student, GRIDS, 2, buckets=BUCKETS)
    before = baked.sample(x, conditions=given)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert torch.equal(baked.sample(x, conditions=given), before)
    with pytest.raises(RuntimeError, match="snapshot"):
        baked.refresh()


def test_holds_fewer_bytes(student):
    baked = bake(student, GRIDS, 2, buckets=BUCKETS).baked
    weights = sum(p.nbytes for p in baked.model.state_dict().values())
    whole = sum(p.nbytes for p in student.state_dict().values())
    assert weights < 0.8 * whole
    assert baked.nbytes_before == whole
    assert baked.tables.nbytes == 3 * 2 * (6 * 2 + 2) * 32 * 4
    assert baked.nbytes == weights + baked.tables.nbytes


def test_saves_and_loads_in_another_process(student, tmp_path):
    baked = bake(student, GRIDS, 2, buckets=BUCKETS)
    x, given = request_of(student)
    want = baked.sample(x, grid="sway", conditions=given)
    baked.save(tmp_path / "student.safetensors")
    save_file({"x": x, **given}, tmp_path / "request.safetensors")
    code = """if True:
        import sys
        from pathlib import Path
        from safetensors.torch import load_file, save_file
        from imf_kernels.graphs import GraphSampler
        from imf_kernels.models import Baked
        folder = Path(sys.argv[1])
        given = load_file(folder / "request.safetensors")
        x = given.pop("x")
        sampler = GraphSampler(Baked.load(folder / "student.safetensors"))
        names = " ".join(sampler.baked.model.state_dict())
        assert "norm.linear" not in names and "time_embed" not in names
        mel = sampler.sample(x, grid="sway", conditions=given)
        save_file({"mel": mel}, folder / "mel.safetensors")
    """
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert relative_rms(load_file(tmp_path / "mel.safetensors")["mel"], want) <= 1e-6


def test_the_file_says_what_it_is(student, tmp_path):
    from safetensors import safe_open

    path = tmp_path / "student.safetensors"
    Baked.of(student.bfloat16(), GRIDS, 2).save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["kind"] == "dit"
    assert json.loads(metadata["grids"])[1] == grids.sway(2).tolist()
    assert json.loads(metadata["config"])["baked"] is True
    assert {"imf_kernels", "torch", "format"} < set(metadata)
    loaded = Baked.load(path)
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.nbytes_before == sum(p.nbytes for p in student.state_dict().values())
    assert loaded.tables.blocks.dtype == torch.float32
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_errors(student, tmp_path):
    with pytest.raises(ValueError, match="grids: expected a list"):
        bake(student, [])
    with pytest.raises(ValueError, match="grids: expected a list"):
        bake(student, "sway", 2)
    with pytest.raises(ValueError, match="same NFE"):
        bake(student, [[0.0, 1.0], [0.0, 0.5, 1.0]])
    with pytest.raises(ValueError, match="nfe: expected 2, as baked"):
        GraphSampler(Baked.of(student, GRIDS, 2), 3)
    with pytest.raises(ValueError, match="got a baked one"):
        bake(student.baked(), GRIDS, 2)
    with pytest.raises(RuntimeError, match="expected a baked sampler"):
        GraphSampler(student, 2).save(tmp_path / "x")
    save_file(student.state_dict(), tmp_path / "plain.safetensors")
    (tmp_path / "text").write_text("no tensors")
    for name in ("plain.safetensors", "text"):
        with pytest.raises(ValueError, match=f"expected a saved baked model, got .*{name}"):
            Baked.load(tmp_path / name)


def test_only_a_dit_is_baked_or_quantised():
    config = CausalUNetConfig(dim=32, mid_blocks=1, depth=1, heads=2, head_dim=16, channels=12)
    unet = CausalUNet(config)
    with pytest.raises(TypeError, match="student: expected a DiT, got CausalUNet"):
        bake(unet, ["uniform"], nfe=2)
    with pytest.raises(TypeError, match="model: expected a DiT, got CausalUNet"):
        fp8.quantize(unet)
