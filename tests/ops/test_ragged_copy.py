import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imf_kernels import backend, backends
from imf_kernels.ops.ragged_copy import Copy, ragged_copy, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
SIZES = st.integers(0, 9)


def values(shape, dtype):
    return torch.randint(-100 if dtype.is_signed else 0, 100, shape, device=DEVICE).to(dtype)


@st.composite
def copies(draw):
    """One copy: any sizes either way, with strides, offsets and inner dimensions of all kinds."""
    dtype = draw(st.sampled_from(DTYPES))
    inner = draw(st.lists(st.integers(1, 20), max_size=2))
    sizes = [[draw(SIZES), draw(SIZES)] for _ in range(2)]
    if not inner and draw(st.booleans()):
        sizes = [size[:1] for size in sizes]
    into, given = ((*size, *inner) for size in sizes)
    pad = draw(st.sampled_from([0, 1, -1, 7.0]))
    destination = values((2, *into), dtype)[draw(st.integers(0, 1))]
    if draw(st.booleans()):
        return Copy(destination, None, pad)
    source = values(tuple(n + draw(st.integers(0, 2)) for n in given), dtype)
    source = source[tuple(slice(source.shape[i] - n, None) for i, n in enumerate(given))]
    if len(given) > 1 and draw(st.booleans()):
        source = source.transpose(0, -1).contiguous().transpose(0, -1)
    return Copy(destination, source, pad)


@pytest.mark.skipif(not backends()["cpp"], reason="needs the C++ extension")
@settings(deadline=None, max_examples=200)
@given(batch=st.lists(copies(), min_size=1, max_size=6))
def test_extension_equals_the_reference(batch):
    expected = [copy.destination.clone() for copy in batch]
    reference([Copy(into, *copy[1:]) for into, copy in zip(expected, batch, strict=True)])
    with backend("cpp"):
        ragged_copy(batch)
    for copy, want in zip(batch, expected, strict=True):
        assert torch.equal(copy.destination, want)


@pytest.fixture(params=["auto", "cpp", "reference"] if backends()["cpp"] else ["auto"])
def either(request):
    with backend(request.param):
        yield


def test_rows_of_their_own_gather_into_a_padded_buffer(either):
    rows = [values((n, 3), torch.float32) for n in (4, 1, 6)]
    buffer = torch.full((4, 5, 3), 9.0, device=DEVICE)
    ragged_copy([*(Copy(buffer[i], row, -1) for i, row in enumerate(rows)), Copy(buffer[3], None)])
    assert torch.equal(buffer[0], torch.cat([rows[0], torch.full((1, 3), -1.0, device=DEVICE)]))
    assert (buffer[1, 1:] == -1).all()
    assert torch.equal(buffer[2], rows[2][:5])
    assert not buffer[3].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_pads_with_the_value_of_each_dtype(either, dtype):
    buffer = values((3, 7), dtype)
    ragged_copy([Copy(buffer, None, 1)])
    assert torch.equal(buffer, torch.ones_like(buffer))


def test_pads_may_be_nan(either):
    buffer = torch.zeros(2, 2, device=DEVICE)
    ragged_copy([Copy(buffer, torch.ones(1, 1, device=DEVICE), torch.nan)])
    assert buffer[0, 0] == 1
    assert buffer.isnan().sum() == 3


def test_nothing_to_copy(either):
    ragged_copy([])
    ragged_copy([Copy(torch.zeros(0, 3, device=DEVICE), torch.zeros(2, 3, device=DEVICE))])


def test_many_rows_need_more_than_one_launch(either):
    rows = [values((n % 7, 2), torch.float32) for n in range(900)]
    buffer = torch.empty(900, 6, 2, device=DEVICE)
    ragged_copy([Copy(buffer[i], row, 5) for i, row in enumerate(rows)])
    for i, row in enumerate(rows):
        assert torch.equal(buffer[i, : len(row)], row[:6])
        assert (buffer[i, len(row) :] == 5).all()


@pytest.mark.parametrize(
    ("copy", "error", "message"),
    [
        (Copy(torch.zeros(4, 4).T, None), ValueError, "destination: expected a contiguous"),
        (Copy(torch.zeros(()), None), ValueError, "destination: expected one dimension"),
        (Copy(torch.zeros(2, 2), torch.zeros(2)), ValueError, "source: expected shape"),
        (Copy(torch.zeros(2, 2, 3), torch.zeros(2, 2, 4)), ValueError, "source: expected shape"),
        (Copy(torch.zeros(2), torch.zeros(2).double()), TypeError, "source: expected"),
        (Copy(torch.zeros(2), torch.zeros(2, device="meta")), ValueError, "source: expected"),
    ],
)
def test_errors(either, copy, error, message):
    with pytest.raises(error, match=message):
        ragged_copy([copy])
