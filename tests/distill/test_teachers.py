"""The teacher that a document asks for."""

from pathlib import Path

import pytest
import torch

from imf_kernels import Teacher
from imf_kernels.distill import config as configs
from imf_kernels.distill.build import build
from imf_kernels.distill.schema import ConfigError
from imf_kernels.graphs import DEFAULT, GraphTeacher, runtime
from imf_kernels.models import load_f5
from tests.distill import made
from tests.distill.test_main import DOCUMENT
from tests.graphs.tape import TapeSlot

RECIPE = Path(__file__).parents[2] / "recipes/f5_tiny.yaml"
BFLOAT16 = "training.precision=bf16"


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made.f5(tmp_path)
    return tmp_path


def run(*overrides):
    return build(configs.load(RECIPE, overrides))


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        ([], torch.float32),
        ([BFLOAT16], torch.bfloat16),
        ([BFLOAT16, "model.teacher_dtype=float32"], torch.float32),
        (["model.teacher_dtype=bfloat16"], torch.bfloat16),
    ],
)
def test_its_dtype_follows_the_precision(place, overrides, dtype):
    built = run(*overrides)
    assert type(built.teacher) is Teacher
    loaded = load_f5("pretrained/model.safetensors", "f5_v1")
    held = built.teacher.model.state_dict()
    name = "transformer_blocks.0.attn.to_q.weight"
    assert torch.equal(held[name], loaded.state_dict()[name].to(dtype))
    assert torch.equal(built.student.state_dict()[name], loaded.state_dict()[name])
    assert held[name].dtype == dtype


def test_its_rollouts_are_replays_also_in_training(place, monkeypatch):
    """Which computes in autocast."""
    monkeypatch.setattr(runtime, "slot_on", TapeSlot)
    short = ["validation=null", "previews=null", "o3s=null", "training.updates=2"]
    built = run(BFLOAT16, "model.graphs=[[4, 80]]", *short)
    assert isinstance(built.teacher, GraphTeacher)
    built.trainer().run()
    stats = built.teacher.stats()
    assert (stats.hits, stats.eager, stats.fallbacks) == (2, 0, {})


def test_without_cuda_the_same_document_runs_eagerly(place):
    short = ["validation=null", "previews=null", "o3s=null", "training.updates=2"]
    built = run("model.graphs=default", *short)
    assert set(built.teacher._engine.buckets) == set(DEFAULT)
    built.trainer().run()
    assert (built.teacher.stats().hits, built.teacher.stats().eager) == (0, 2)


def test_errors_of_graphs(place):
    with pytest.raises(ConfigError, match=r"^model.graphs: buckets: expected \(rows, frames\)"):
        run("model.graphs=[[4]]")
    (place / "own.yaml").write_text(DOCUMENT)
    with pytest.raises(ConfigError, match=r"^model.graphs: model: expected"):
        build(configs.load("own.yaml", ["model.graphs=default"]))
