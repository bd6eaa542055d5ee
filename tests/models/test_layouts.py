"""Where rows lie is made once a solve, and evaluations with it are those without."""

from unittest import mock

import pytest
import torch

from imf_kernels import Teacher, grids, sampler
from imf_kernels.models import CausalUNet, CausalUNetConfig
from imf_kernels.rows import Rows
from tests.models.tools import conditions, small_model

LENGTHS = [9, 14, 5]
LAYOUTS = pytest.mark.parametrize("packed", [False, True, 40])
FAMILIES = pytest.mark.parametrize("family", ["f5_v1", "cosyvoice3", "cosyvoice2"])


def made(family):
    if family != "cosyvoice2":
        return small_model(family, mixer=True)
    sizes = {"dim": 32, "mid_blocks": 1, "depth": 1, "heads": 1}
    return CausalUNet(CausalUNetConfig(mixer=True, **sizes)).eval()


def prepared(model, **how):
    return model.prepare(**conditions(model, LENGTHS), **how)


def noise(model):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(LENGTHS), max(LENGTHS), model.channels, generator=generator)


@FAMILIES
@LAYOUTS
@pytest.mark.parametrize("guided", [False, True])
@torch.no_grad()
def test_a_layout_changes_nothing(family, packed, guided):
    model = made(family)
    cond, x = prepared(model, packed=packed, guided=guided), noise(model)
    x[0, LENGTHS[0] :] = torch.nan
    modulation = model.tables(torch.zeros(1), torch.ones(1)).at(0)
    laid_out = model.lay_out(cond, len(LENGTHS))
    assert cond.layout is None
    assert dict(laid_out) == dict(cond)
    got = model.evaluate(x, modulation, laid_out)
    assert torch.equal(got, model.evaluate(x, modulation, cond))
    assert got.isfinite().all()


@FAMILIES
@LAYOUTS
@pytest.mark.parametrize("way", ["sample", "live", "integrate"])
def test_a_solve_makes_it_once(family, packed, way):
    model = made(family)
    cond, x = prepared(model, packed=packed, guided=way == "integrate"), noise(model)
    times = torch.zeros(len(LENGTHS)), torch.ones(len(LENGTHS))
    with (
        mock.patch.object(Rows, "padded", side_effect=Rows.padded) as padded,
        mock.patch.object(Rows, "packed", side_effect=Rows.packed) as packs,
    ):
        if way == "integrate":
            Teacher(model, 2.0).integrate(x, *times, 3, cond)
        else:
            sampler.sample(model, x, cond, grids.uniform(3), grad=way == "live")
    assert padded.call_count + packs.call_count == 1


@torch.no_grad()
def test_a_layout_of_another_batch_is_not_used():
    """A guided conditioning may be evaluated as the rows of both branches."""
    model = made("f5_v1")
    cond, x = prepared(model, guided=True), noise(model)
    modulation = model.tables(torch.zeros(1), torch.ones(1)).at(0)
    want = model.evaluate(x, modulation, cond)
    got = model.evaluate(x.repeat(2, 1, 1), modulation, model.lay_out(cond, len(LENGTHS)))
    torch.testing.assert_close(got, want)


def test_what_is_taken_of_it_has_none():
    model = made("f5_v1")
    cond = model.lay_out(prepared(model, guided=True), len(LENGTHS))
    parts = (cond.take(slice(1, 3)), cond.conditional(len(LENGTHS)), cond.to("cpu"))
    assert cond.layout is not None
    assert all(part.layout is None for part in parts)


def test_rows_and_conditions_fit():
    model = made("f5_v1")
    cond = prepared(model)
    with pytest.raises(ValueError, match="x: expected 3 rows, or half of it when guided, got 2"):
        model.lay_out(cond, 2)
    with pytest.raises(TypeError, match="cond: expected what `prepare` returned, got dict"):
        model.lay_out(dict(cond), 3)
