"""An FP8 model goes through graphs and baking as any other does."""

import pytest
import torch

from imf_kernels import Teacher, sampler
from imf_kernels.graphs import GraphSampler, GraphTeacher, bake
from imf_kernels.models import Baked
from tests.models.tools import conditions, relative_rms, small_model

BUCKETS = [(2, 32)]


@pytest.fixture
def student():
    return small_model("f5_v1").student().eval()


@pytest.fixture
def request_of(student):
    return torch.randn(2, 30, 12), conditions(student, [30, 22])


def test_solves_as_it_does_alone(either, student, request_of):
    model, (x, given) = student.fp8(), request_of
    want = sampler.sample(model, x, model.prepare(**given), "sway", nfe=3)
    graphs = GraphSampler(model, 3, BUCKETS, grid="sway")
    # a bucket's sums round elsewhere, and a code may tip over
    assert relative_rms(graphs.sample(x, conditions=given), want) <= 0.01
    again = graphs.sample(x, conditions=given)
    assert torch.equal(again, graphs.sample(x, conditions=given))
    assert graphs.stats().fallbacks == {}


def test_a_teacher_rolls_out(either, student, request_of):
    model, (x, given) = student.fp8(), request_of
    cond = model.prepare(**given, guided=True)
    t, r = torch.zeros(2), torch.ones(2)
    got = GraphTeacher(model, 2.0, buckets=BUCKETS).integrate(x, t, r, 2, cond)
    want = Teacher(model, 2.0).integrate(x, t, r, 2, cond)
    assert relative_rms(got.displacement, want.displacement) <= 0.01


def test_its_buffers_are_watched(either, student, request_of):
    model, (x, given) = student.fp8(), request_of
    graphs = GraphSampler(model, 2, BUCKETS)
    layer = model.transformer_blocks[1].ff.ff[2]
    layer.weight_scale = 2 * layer.weight_scale
    with pytest.raises(RuntimeError, match=r"ff\.ff\.2\.weight_scale' has moved or was replaced"):
        graphs.sample(x, conditions=given)


def test_bakes_and_is_saved(either, student, request_of, tmp_path):
    x, given = request_of
    baked = bake(student.fp8(), ["uniform"], 2, buckets=BUCKETS)
    want = baked.sample(x, conditions=given)
    baked.save(tmp_path / "fp8.safetensors")
    loaded = Baked.load(tmp_path / "fp8.safetensors")
    assert loaded.model.config == baked.model.config
    assert torch.equal(GraphSampler(loaded, buckets=BUCKETS).sample(x, conditions=given), want)
    assert loaded.nbytes < bake(student.bfloat16(), ["uniform"], 2, buckets=BUCKETS).baked.nbytes
