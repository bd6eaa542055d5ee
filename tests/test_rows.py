import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from imf_kernels.rows import Rows

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def batch(lengths, spare=2):
    """A padded batch `(R, N, 3)`, NaN beyond the lengths, and where its frames are."""
    frames = max(lengths) + spare
    inside = torch.arange(frames) < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), frames, 3).masked_fill(~inside[:, :, None], torch.nan), inside


@given(LENGTHS, st.integers(0, 4))
def test_packing_puts_rows_behind_one_another(lengths, spare):
    x, inside = batch(lengths)
    rows = Rows.packed(torch.tensor(lengths), sum(lengths) + spare, x.shape[1])
    packed = rows.pack(x)
    assert torch.equal(packed[: sum(lengths)], x[inside])
    assert packed.isfinite().all()
    packed[sum(lengths) :] = torch.nan
    again = rows.unpack(packed, x.shape[1])
    assert torch.equal(again, torch.where(inside[:, :, None], x, 0))


@given(LENGTHS)
def test_padded_rows_pack_to_what_they_are(lengths):
    x, inside = batch(lengths)
    rows = Rows.padded(torch.tensor(lengths), x.shape[1])
    x = torch.where(inside[:, :, None], x, 0)
    assert torch.equal(rows.pack(x)[rows.row_of >= 0], x[inside])
    assert torch.equal(rows.unpack(x.flatten(0, 1), x.shape[1]), x)


@given(LENGTHS, st.booleans())
def test_places_are_counted_from_each_rows_start(lengths, packed):
    sizes = torch.tensor(lengths)
    rows = Rows.packed(sizes, sum(lengths) + 3, 9) if packed else Rows.padded(sizes, 11)
    row, place = (part[rows.row_of >= 0] for part in rows.places())
    assert row.tolist() == [i for i, length in enumerate(lengths) for _ in range(length)]
    assert place.tolist() == [n for length in lengths for n in range(length)]


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_repeated_layouts(kind):
    lengths = torch.tensor([3, 1, 4])
    one = Rows.padded(lengths, 5) if kind == "padded" else Rows.packed(lengths, 10, 5)
    both = one.repeat(2)
    if kind == "padded":
        for mine, wanted in zip(both, Rows.padded(lengths.repeat(2), 5), strict=True):
            assert mine is wanted or torch.equal(torch.as_tensor(mine), torch.as_tensor(wanted))
    x = torch.randn(6, 5, 2)
    halves = torch.cat([one.pack(x[:3]), one.pack(x[3:])])
    assert torch.equal(both.pack(x)[both.row_of >= 0], halves[both.row_of >= 0])
    assert torch.equal(
        both.unpack(halves, 5), torch.cat([one.unpack(h, 5) for h in halves.chunk(2)])
    )
    assert all(t.dtype == torch.int32 for t in both[:3])


def test_gradients_pass_through_packing():
    rows = Rows.packed(torch.tensor([2, 3]), 7, 4)
    x = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rows.pack, [x])
    y = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: rows.unpack(y, 4), [y])
