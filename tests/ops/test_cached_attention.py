import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imf_kernels.ops import attention, cached_attention
from imf_kernels.ops.cached_attention import _op
from imf_kernels.rows import Rows
from tests.ops.layouts import LAYOUTS, alone, assert_nothing_else, layout, poisoned, rows_of
from tests.ops.test_attention import PATHS, chunks, dense, width_for
from tests.ops.tools import (
    DEVICE,
    HALF,
    assert_compiles_once,
    assert_error_rule,
    backend,
    poisoned_memory,
)

HELD = [0, 50, 7, 61]
NEW = [1, 63, 17, 70]


def inputs(kind, held, new, heads=2, width=32, dtype=torch.float32, spare=3):
    """Whole rows `(N, 3, H, width)`, and the arguments with the last frames of each as new ones.

    The rows lie in the cache from behind, apart from each other, in NaN.
    """
    rows, frames = layout(kind, new, spare)
    whole = [
        torch.randn(a + b, 3, heads, width, device=DEVICE).to(dtype)
        for a, b in zip(held, new, strict=True)
    ]
    kv = torch.full((sum(held) + sum(new) + 7 * len(new), 2, heads, width), torch.nan, dtype=dtype)
    kv, q, starts, end = kv.to(DEVICE), poisoned_queries(rows, frames, heads, width, dtype), [], 0
    for row in reversed(whole):
        kv[end : end + len(row)] = row[:, 1:]
        starts.insert(0, end)
        end += len(row) + 7
    for at, row, count in zip(rows.starts.tolist(), whole, new, strict=False):
        q[at : at + count] = row[len(row) - count :, 0]
    lengths = torch.tensor([len(row) for row in whole], dtype=torch.int32, device=DEVICE)
    kv_starts = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    return whole, (q, kv, rows, kv_starts, lengths)


def poisoned_queries(rows, frames, heads, width, dtype):
    return poisoned(torch.zeros(frames, heads, width, device=DEVICE, dtype=dtype), rows)


@pytest.mark.parametrize("name", ["reference", *PATHS])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("chunk", [None, 16, 50])
def test_outputs_follow_the_error_rule(name, dtype, kind, chunk):
    whole, given = inputs(kind, HELD, NEW, width=width_for(name), dtype=dtype)
    rows = given[2]
    with backend(name), poisoned_memory():
        out = cached_attention(*given, chunks(rows, chunk))
    assert out.dtype == dtype
    assert_nothing_else(out, rows)
    for row, got in zip(whole, rows_of(out, rows), strict=True):
        exact = dense(row.double(), chunk)[len(row) - len(got) :]
        same_dtype = dense(row, chunk)[len(row) - len(got) :]
        assert_error_rule(got, same_dtype, exact, atol=2e-6 * float(exact.abs().max()))


@pytest.mark.parametrize("name", PATHS)
@settings(max_examples=10, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 60)), min_size=1, max_size=4),
    chunk=st.none() | st.integers(1, 70),
    kind=st.sampled_from(LAYOUTS),
)
def test_a_row_has_the_bits_it_has_alone(name, sizes, chunk, kind):
    _, (q, kv, rows, starts, lengths) = inputs(kind, *zip(*sizes, strict=True), 1, width_for(name))
    with backend(name):
        together = cached_attention(q, kv, rows, starts, lengths, chunks(rows, chunk))
        for i, (one, got) in enumerate(zip(rows_of(q, rows), rows_of(together, rows), strict=True)):
            single, at, of = alone(len(one)), starts[i : i + 1], lengths[i : i + 1]
            want = cached_attention(one, kv, single, at, of, chunks(single, chunk))
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", PATHS)
def test_whole_blocks_have_the_bits_of_the_whole_row(name):
    """A cache of whole blocks changes nothing: each was solved without the later ones."""
    (row,), (q, kv, rows, *where) = inputs("packed", [64], [40], 2, width_for(name), spare=0)
    with backend(name):
        got = cached_attention(q, kv, rows, *where, chunks(rows, 32))
        want = attention(row, alone(104), chunks(rows, 32))[64:]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["reference", *PATHS])
def test_strided_views(name):
    _, (q, kv, *rest) = inputs("packed", [5, 9], [20, 31], 2, 32)
    with backend(name):
        want = cached_attention(q, kv, *rest)
        wide = torch.stack([q, q], dim=3).flatten(2)[..., ::2]
        layers = torch.stack([kv, kv], dim=1)[:, 1]
        torch.testing.assert_close(cached_attention(wide, layers, *rest), want)


@pytest.mark.parametrize("name", ["reference", *PATHS])
def test_empty(name):
    _, given = inputs("packed", [], [], spare=4)
    with backend(name):
        assert float(cached_attention(*given).abs().sum()) == 0


@pytest.mark.parametrize("name", PATHS)
def test_opcheck(name):
    _, (q, kv, rows, *where) = inputs("packed", [3, 0], [5, 3], spare=0)
    with backend(name):
        torch.library.opcheck(_op, (q, torch.nan_to_num(kv), *rows, *where, None, 0.1))


@pytest.mark.parametrize("name", ["reference", *PATHS])
def test_compiles_without_graph_breaks_or_recompiles(name):
    def run(q, kv, lengths, kv_starts, kv_lengths):
        rows = Rows.padded(lengths, len(q) // 2)
        return cached_attention(q, kv, rows, kv_starts, kv_lengths)

    with backend(name):
        calls = []
        for count in (7, 12, 33):
            _, (q, kv, rows, *where) = inputs("padded", [3, 4], [count, count - 2], spare=0)
            calls.append((torch.nan_to_num(q), kv, rows.lengths.long(), *where))
        assert_compiles_once(run, *calls)


@pytest.mark.parametrize("name", PATHS)
def test_forward_mode_ad_is_refused(name):
    _, (q, *rest) = inputs("packed", [2], [3], spare=0)
    with backend(name), pytest.raises(RuntimeError, match="forward-mode AD"):
        torch.func.jvp(lambda x: cached_attention(x, *rest), (q,), (q,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(8, 2, 2, 32)}, "q: expected shape"),
        ({"q": torch.zeros(8, 2, 32).int()}, "q: expected torch.float32"),
        ({"q": torch.zeros(8, 2, 32).requires_grad_()}, "q: expected a tensor without gradient"),
        ({"kv": torch.zeros(20, 2, 2, 16)}, "kv: expected shape"),
        ({"kv": torch.zeros(20, 2, 2, 32).half()}, "kv: expected torch.float32"),
        ({"kv": torch.zeros(20, 2, 2, 64)[..., ::2]}, "kv: expected unit stride"),
        ({"rows": None}, "rows: expected Rows"),
        ({"kv_starts": torch.tensor([0])}, "kv_starts: expected torch.int32"),
        ({"kv_starts": torch.tensor([13]).int()}, "kv_lengths: expected rows within a cache of 20"),
        ({"kv_lengths": torch.tensor([7]).int()}, "kv_lengths: expected no fewer than the new"),
        ({"chunk": torch.tensor([0])}, "chunk: expected blocks"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {
        "q": torch.zeros(8, 2, 32),
        "kv": torch.zeros(20, 2, 2, 32),
        "rows": Rows.padded(torch.tensor([8]), 8),
        "kv_starts": torch.tensor([0]).int(),
        "kv_lengths": torch.tensor([8]).int(),
    } | change
    with pytest.raises((TypeError, ValueError), match=message):
        cached_attention(**given)
