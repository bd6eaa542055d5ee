import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imf_kernels.ops import attention
from imf_kernels.ops.attention import _op, _op_backward
from imf_kernels.rows import Rows
from tests.ops.layouts import LAYOUTS, alone, assert_nothing_else, layout, poisoned, rows_of
from tests.ops.tools import (
    DEVICE,
    HALF,
    assert_compiles_once,
    assert_error_rule,
    backend,
    kernel_backends,
    poisoned_memory,
    with_gradients,
)

PATHS = ["auto", *kernel_backends()]
LENGTHS = [1, 63, 17, 130]


def inputs(rows: Rows, frames: int, heads=2, width=32, dtype=torch.float32):
    qkv = torch.randn(frames, 3, heads, width, device=DEVICE).to(dtype)
    return poisoned(qkv, rows)


def width_for(name: str) -> int:
    """On the CPU the C++ kernel has heads of 64 in float32."""
    return 64 if name == "auto" else 32


def chunks(rows: Rows, size: int | None):
    return None if size is None else torch.full_like(rows.lengths, size)


def dense(qkv: torch.Tensor, chunk: int | None) -> torch.Tensor:
    """One row with all its scores, as the clients write it."""
    q, k, v = qkv.transpose(0, 2).unbind(1)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if chunk is not None:
        block = torch.arange(len(qkv), device=qkv.device) // chunk
        scores = scores.masked_fill(block[None, :] > block[:, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("chunk", [None, 16, 50])
def test_outputs_and_gradients_follow_the_error_rule(name, dtype, kind, chunk):
    rows, frames = layout(kind, LENGTHS)
    width = width_for(name)
    qkv = inputs(rows, frames, width=width, dtype=dtype)
    grad = torch.randn(frames, 2, width, device=DEVICE).to(dtype)
    with backend(name), poisoned_memory():
        ours = with_gradients(lambda x: attention(x, rows, chunks(rows, chunk)), [qkv], grad)
    for result in ours:
        assert result.dtype == dtype
        assert_nothing_else(result, rows)
    spans = zip(*(rows_of(x, rows) for x in (qkv, grad, *ours)), strict=True)
    for one, grad_one, *got in spans:
        exact = with_gradients(lambda x: dense(x, chunk), [one.double()], grad_one.double())
        same_dtype = with_gradients(lambda x: dense(x, chunk), [one], grad_one)
        for mine, allowed, true in zip(got, same_dtype, exact, strict=True):
            assert_error_rule(mine, allowed, true, atol=2e-6 * float(true.abs().max()))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("width", [32, 64, 128, 24])
def test_head_widths(name, width):
    rows, frames = layout("packed", [33, 9])
    qkv, grad = inputs(rows, frames, 1, width), torch.randn(frames, 1, width, device=DEVICE)
    with backend("reference"):
        want = with_gradients(lambda x: attention(x, rows), [qkv], grad)
    with backend(name):
        got = with_gradients(lambda x: attention(x, rows), [qkv], grad)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PATHS)
@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    chunk=st.none() | st.integers(1, 100),
    kind=st.sampled_from(LAYOUTS),
)
def test_a_row_has_the_bits_it_has_alone(name, lengths, chunk, kind):
    rows, frames = layout(kind, lengths)
    qkv = inputs(rows, frames, 1, width_for(name))
    with backend(name):
        together = attention(qkv, rows, chunks(rows, chunk))
        for one, got in zip(rows_of(qkv, rows), rows_of(together, rows), strict=True):
            single = alone(len(one))
            assert torch.equal(got, attention(one, single, chunks(single, chunk)))


@pytest.mark.parametrize("name", ["reference", *PATHS])
def test_strided_views(name):
    rows, frames = layout("padded", [20, 31], spare=0)
    wide = torch.randn(frames, 4, 5, 64, device=DEVICE)
    for view in (wide[:, 1:, 2:4, :32], wide[:, :3, :, ::2]):
        with backend(name):
            got = attention(view, rows)
        torch.testing.assert_close(got, attention(view.contiguous(), rows))


@pytest.mark.parametrize("name", ["reference", *PATHS])
def test_empty(name):
    rows, frames = layout("packed", [], spare=4)
    qkv = inputs(rows, frames)
    with backend(name):
        got = with_gradients(
            lambda x: attention(x, rows), [qkv], torch.randn(4, 2, 32, device=DEVICE)
        )
    assert all(float(part.abs().sum()) == 0 for part in got)


@pytest.mark.parametrize("name", PATHS)
def test_gradients_are_deterministic(name):
    rows, frames = layout("packed", LENGTHS)
    qkv, grad = inputs(rows, frames), torch.randn(frames, 2, 32, device=DEVICE)
    with backend(name):
        first, second = (with_gradients(lambda x: attention(x, rows), [qkv], grad) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("chunk", [None, 2])
def test_gradcheck(chunk):
    rows, frames = layout("packed", [3, 4], spare=0)
    qkv = inputs(rows, frames, 2, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention(x, rows, chunks(rows, chunk)), [qkv])


@pytest.mark.parametrize("name", PATHS)
def test_opcheck(name):
    rows, frames = layout("packed", [5, 3], spare=0)
    qkv = inputs(rows, frames)
    out, grad = torch.randn(2, frames, 2, 32, device=DEVICE)
    sums = torch.randn(2, frames, device=DEVICE)
    with backend(name):
        torch.library.opcheck(_op, (qkv.requires_grad_(), *rows, None, 0.1, ""))
        torch.library.opcheck(_op_backward, (grad, qkv.detach(), out, sums, *rows, None, 0.1))


@pytest.mark.parametrize("name", ["reference", *PATHS])
def test_compiles_without_graph_breaks_or_recompiles(name):
    def run(qkv, lengths):
        return attention(qkv, Rows.padded(lengths, len(qkv) // 2))

    with backend(name):
        calls = []
        for length in (7, 12, 33):
            rows, frames = layout("padded", [length, length - 2], spare=0)
            calls.append((torch.nan_to_num(inputs(rows, frames)), rows.lengths.long()))
        assert_compiles_once(run, *calls)


def test_jvp_on_the_reference():
    rows, frames = layout("packed", [3, 5], spare=0)
    qkv, tangent = (inputs(rows, frames).double() for _ in range(2))
    step = 1e-6
    with backend("reference"):
        _, got = torch.func.jvp(lambda x: attention(x, rows), (qkv,), (tangent,))
        ahead, behind = (attention(qkv + s * tangent, rows) for s in (step, -step))
    torch.testing.assert_close(got, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PATHS)
def test_forward_mode_ad_is_refused(name):
    rows, frames = layout("packed", [3], spare=0)
    qkv = inputs(rows, frames)
    with backend(name), pytest.raises(RuntimeError, match="forward-mode AD"):
        torch.func.jvp(lambda x: attention(x, rows), (qkv,), (qkv,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(8, 2, 2, 32)}, "qkv: expected shape"),
        ({"qkv": torch.zeros(8, 3, 2, 32).int()}, "qkv: expected torch.float32"),
        ({"qkv": torch.zeros(9, 3, 2, 32)}, "rows.row_of: expected shape"),
        ({"chunk": torch.tensor([1, 2])}, "chunk: expected shape"),
        ({"chunk": torch.tensor([1.0])}, "chunk: expected torch.int64"),
        ({"rows": None}, "rows: expected Rows"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {"qkv": torch.zeros(8, 3, 2, 32), "rows": Rows.padded(torch.tensor([8]), 8)} | change
    with pytest.raises((TypeError, ValueError), match=message):
        attention(**given)
