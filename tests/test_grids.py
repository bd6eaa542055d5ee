import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imf_kernels import grids

NAMES = tuple(grids.NAMED)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=40)
@given(nfe=st.integers(1, 128))
def test_named_grid_ascends_from_0_to_1(name, nfe):
    grid = grids.make(name, nfe)
    assert grid.dtype == torch.float32
    assert grid.shape == (nfe + 1,)
    assert grid[0] == 0
    assert grid[-1] == 1
    assert (grid.diff() > 0).all()
    assert grid.diff().double().sum() == pytest.approx(1, abs=1e-6)
    assert torch.equal(grids.validate(grid), grid)


def test_uniform():
    assert torch.equal(grids.uniform(4), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))


@pytest.mark.parametrize("coefficient", [-1.0, -0.5, 0.0, 0.4])
def test_sway_formula(coefficient):
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    want = t + coefficient * (torch.cos(math.pi * t / 2) - 1 + t)
    torch.testing.assert_close(grids.sway(8, coefficient).double(), want, rtol=0, atol=2e-7)


def test_cosine_formula_and_that_full_sway_equals_it():
    want = torch.tensor([1 - math.cos(math.pi * k / 10) for k in range(6)])
    torch.testing.assert_close(grids.cosine(5), want, rtol=0, atol=2e-7)
    torch.testing.assert_close(grids.sway(5), want, rtol=0, atol=2e-7)


def test_sway_puts_steps_near_the_noise():
    assert (grids.sway(8)[1:-1] < grids.uniform(8)[1:-1]).all()


@pytest.mark.parametrize(
    ("nfe", "thirty_seconds"),
    [
        (5, [0, 2, 4, 8, 16, 32]),
        (6, [0, 2, 4, 6, 8, 16, 32]),
        (7, [0, 2, 4, 6, 8, 16, 24, 32]),
        (10, [0, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32]),
        (12, [0, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32]),
        (16, [*range(9), 10, 12, 14, 16, 20, 24, 28, 32]),
    ],
)
def test_epss_is_the_table_under_sway(nfe, thirty_seconds):
    want = [1 - math.cos(math.pi * k / 64) for k in thirty_seconds]
    torch.testing.assert_close(grids.epss(nfe), torch.tensor(want), rtol=0, atol=2e-7)
    plain = torch.tensor([k / 32 for k in thirty_seconds])
    torch.testing.assert_close(grids.epss(nfe, coefficient=0.0), plain, rtol=0, atol=2e-7)


@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 8, 32])
def test_epss_without_a_table_is_sway(nfe):
    assert torch.equal(grids.epss(nfe), grids.sway(nfe))


def test_warp_sway_keeps_its_argument():
    grid = grids.uniform(4)
    grids.warp_sway(grid)
    assert torch.equal(grid, grids.uniform(4))


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, "float64"])
def test_custom_grid_becomes_float32(kind):
    values = [0.0, 0.125, 0.75, 1.0]
    grid = torch.tensor(values, dtype=torch.float64) if kind == "float64" else kind(values)
    made = grids.make(grid, 3)
    assert made.dtype == torch.float32
    assert made.tolist() == values
    assert torch.equal(grids.make(grid), made)


def test_min_gap():
    grid = [0.0, 0.25, 0.5, 1.0]
    assert grids.validate(grid, min_gap=0.25).tolist() == grid
    with pytest.raises(ValueError, match=r"grid: expected neighbours at least 0\.3 apart"):
        grids.validate(grid, min_gap=0.3)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-0.5, 1.5, width=32), min_size=0, max_size=6))
def test_validate_takes_ascending_grids_and_no_others(inner):
    grid = [0.0, *inner, 1.0]
    if all(a < b for a, b in itertools.pairwise(grid)):
        assert grids.validate(grid).tolist() == grid
    else:
        with pytest.raises(ValueError, match="grid: expected strictly ascending times"):
            grids.validate(grid)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_grids_are_float32_whatever_the_default_dtype(default):
    before = {name: make(4) for name, make in grids.NAMED.items()}
    torch.set_default_dtype(default)
    try:
        for name, make in grids.NAMED.items():
            assert make(4).dtype == torch.float32
            torch.testing.assert_close(make(4), before[name])
    finally:
        torch.set_default_dtype(torch.float32)
