import pytest
import torch

from imf_kernels.rows import Rows
from tests.models.tools import conditions, relative_rms, small_model

LENGTHS = [20, 1, 37]


@pytest.fixture(params=["f5_v0", "f5_v1"])
def tower(request):
    return small_model(request.param).text_embed


@pytest.fixture
def text():
    return conditions(small_model("f5_v1"), LENGTHS)["text"]


@pytest.mark.parametrize("guided", [False, True])
def test_packed_rows_are_the_padded_ones_behind_one_another(tower, text, guided):
    sizes = torch.tensor(LENGTHS)
    padded, packed = Rows.padded(sizes, 40), Rows.packed(sizes, sum(LENGTHS) + 5, 40)
    with torch.no_grad():
        side_by_side, behind = (tower(text, rows, guided) for rows in (padded, packed))
    assert behind.shape == (1 + guided, sum(LENGTHS) + 5, 16)
    for one, other in zip(side_by_side, behind, strict=True):
        assert relative_rms(packed.unpack(other, 40), one.unflatten(0, (3, 40))) <= 1e-6
        assert not other[sum(LENGTHS) :].any()


def test_rows_of_no_frames_and_texts_of_any_length(tower, text):
    """A static buffer's unused rows; text beyond a row is cut, the filler goes on to its end."""
    rows = Rows.packed(torch.tensor([20, 0, 37]), 57, 40)
    with torch.no_grad():
        expected = tower(text, rows, True)
        longer = torch.nn.functional.pad(text, (0, 9), value=-1)
        longer[0, 20:] = 3
        assert torch.equal(tower(longer, rows, True), expected)
        shorter = tower(text[:, :5], rows, True)
    assert shorter.isfinite().all()
    assert not torch.equal(shorter, expected)


def test_the_text_is_dropped_in_the_second_branch(tower, text):
    """But where it stood, v1's mask still knows."""
    rows, other = Rows.padded(torch.tensor(LENGTHS), 37), torch.where(text < 0, -1, 7)
    with torch.no_grad():
        mine, theirs, nothing = (
            tower(ids, rows, True) for ids in (text, other, torch.full_like(text, -1))
        )
    assert torch.equal(mine[1], theirs[1])
    assert not torch.equal(mine[0], theirs[0])
    assert torch.equal(nothing[0], nothing[1])
    assert torch.equal(nothing[1], mine[1]) != tower.config.mask_padding
