import pytest
import torch
from torch.nn import functional as F

from imf_kernels.ops.grouped_conv import (
    _op,
    _op_backward,
    _reference_backward,
    _taps_before_channels,
    grouped_conv_mish,
    reference,
)
from imf_kernels.rows import Rows
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

BACKENDS = ["reference", *kernel_backends()]
LENGTHS = (1, 17, 63)


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch):
    """PyTorch's convolutions, which kernels are compared with."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def padded(lengths=LENGTHS, frames=None):
    return Rows.padded(torch.tensor(lengths, device=DEVICE), frames or max(lengths) + 3)


def packed(lengths=LENGTHS, tail=5):
    lengths = torch.tensor(lengths, device=DEVICE)
    return Rows.packed(lengths, int(lengths.sum()) + tail, int(lengths.max()))


LAYOUTS = [padded, packed]


def inputs(rows, dim, groups, taps, dtype=torch.float32, garbage=torch.nan):
    """x, weight, bias and residual; `garbage` stands where no row is."""
    frames = rows.row_of.shape[0]
    x, residual = (torch.randn(frames, dim, device=DEVICE).to(dtype) for _ in range(2))
    x[rows.row_of < 0], residual[rows.row_of < 0] = garbage, garbage
    width = dim // groups
    weight = torch.randn(dim, width, taps, device=DEVICE) * (width * taps) ** -0.5
    return [x, weight.to(dtype), torch.randn(dim, device=DEVICE).to(dtype), residual]


def plain(rows, causal):
    """Same-dtype PyTorch, one row at a time."""

    def run(x, weight, bias, residual):
        groups, taps = x.shape[1] // weight.shape[1], weight.shape[2]
        pad = (taps - 1, 0) if causal else (taps // 2, taps // 2)
        y = torch.zeros_like(x)
        for start, length in zip(rows.starts[:-1].tolist(), rows.lengths.tolist(), strict=True):
            if length:
                own = slice(start, start + length)
                z = F.conv1d(F.pad(x[own].T[None], pad), weight, bias, groups=groups)
                y[own] = F.mish(z)[0].T + residual[own]
        return y

    return run


def ours(rows, causal):
    return lambda x, weight, bias, residual=None: grouped_conv_mish(
        x, weight, bias, rows, causal=causal, residual=residual
    )


CASES = [
    (padded, False, (32, 16, 31)),
    (packed, True, (48, 2, 31)),
    (packed, False, (48, 16, 3)),
    (padded, True, (256, 16, 3)),
    (packed, False, (256, 2, 3)),
]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("layout", "causal", "size"), CASES)
def test_outputs_and_gradients_follow_the_error_rule(name, dtype, layout, causal, size):
    rows = layout()
    args = inputs(rows, *size, dtype)
    grad = torch.randn_like(args[0])
    grad[rows.row_of < 0] = torch.nan
    exact = with_gradients(plain(rows, causal), [a.double() for a in args], grad.double())
    same_dtype = with_gradients(plain(rows, causal), args, grad)
    with backend(name), poisoned_memory():
        got = with_gradients(ours(rows, causal), args, grad)
    for mine, allowed, true in zip(got, same_dtype, exact, strict=True):
        assert mine.dtype == dtype
        assert_error_rule(mine, allowed, true, atol=1e-6 * max(float(true.abs().max()), 1))
    for per_frame in (got[0], got[1], got[4]):
        assert not per_frame[rows.row_of < 0].any()


def test_closed_form():
    """One channel, the taps 1, 2, 4: mish of 0, and of large sums, which it leaves as they are."""
    x = torch.tensor([[100.0], [0.0], [200.0], [0.0]], device=DEVICE)
    weight, bias = torch.tensor([[[1.0, 2.0, 4.0]]], device=DEVICE), x.new_zeros(1)
    for causal, expected in (
        (False, [[200.0], [100.0], [400.0], [200.0]]),
        (True, [[400.0], [200.0], [800.0], [400.0]]),
    ):
        rows = packed((2, 2), tail=0)
        y = grouped_conv_mish(x, weight, bias, rows, causal=causal)
        torch.testing.assert_close(y, torch.tensor(expected, device=DEVICE))


@pytest.mark.parametrize("name", BACKENDS)
def test_mish_far_from_zero(name):
    """Biases alone, from where Mish is z to where it is 0, and its derivative."""
    rows, z = packed((1,), tail=0), torch.linspace(-200, 200, 48, device=DEVICE)
    args = torch.ones(1, 48, device=DEVICE), torch.zeros(48, 3, 3, device=DEVICE), z
    exact = with_gradients(F.mish, [z.double()], torch.ones(48, device=DEVICE))
    with backend(name):
        got = with_gradients(ours(rows, False), list(args), torch.ones_like(args[0]))
    torch.testing.assert_close(got[0][0].double(), exact[0], rtol=2e-5, atol=1e-30)
    torch.testing.assert_close(got[3].double(), exact[1], rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_equals_its_rows(name, causal, layout):
    rows = layout()
    x, weight, bias, residual = inputs(rows, 48, 2, 31)
    with backend(name):
        together = ours(rows, causal)(x, weight, bias, residual)
        for i, length in enumerate(LENGTHS):
            own, row = rows.row_of == i, packed((length,), tail=0)
            alone = ours(row, causal)(x[own], weight, bias, residual[own])
            torch.testing.assert_close(together[own], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_with_gaps(name):
    """Rows need not fill what lies between them."""
    starts, lengths = [4, 14, 30], [10, 9, 20]
    row_of = torch.full((55,), -1, dtype=torch.int32, device=DEVICE)
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        row_of[start : start + length] = i
    numbers = {"dtype": torch.int32, "device": DEVICE}
    rows = Rows(
        torch.tensor([*starts, 55], **numbers), torch.tensor(lengths, **numbers), row_of, 20
    )
    args = inputs(rows, 32, 2, 3)
    grad = torch.randn_like(args[0])
    expected = with_gradients(plain(rows, False), args, grad)
    with backend(name):
        got = with_gradients(ours(rows, False), args, grad)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_longer_than_a_block(name):
    """Padding in whole blocks, and rows over several: each starts at another place of its block."""
    rows = padded((150, 1, 70), frames=160)
    args = inputs(rows, 32, 2, 31)
    grad = torch.randn_like(args[0])
    expected = with_gradients(plain(rows, True), args, grad)
    with backend(name), poisoned_memory():
        got = with_gradients(ours(rows, True), args, grad)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
def test_strided_tensors(name):
    """Transposed x, residual and gradient; a weight with channels last, which is not copied."""
    rows = packed()
    args, grad = inputs(rows, 32, 2, 3), torch.randn(rows.row_of.shape[0], 32, device=DEVICE)
    expected = with_gradients(ours(rows, False), args, grad)
    views = [a if a.ndim == 1 else a.mT.contiguous().mT for a in args]
    assert _taps_before_channels(views[1], views[0]).data_ptr() == views[1].data_ptr()
    with backend(name):
        got = with_gradients(ours(rows, False), views, grad.mT.contiguous().mT)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_weights_of_another_dtype(name):
    """As under autocast: multiplied in x's dtype, gradients in their own."""
    rows = packed()
    x, weight, bias, residual = inputs(rows, 32, 2, 3)
    args, grad = [x.bfloat16(), weight, bias, residual], torch.randn_like(x)
    rounded = [args[0], weight.bfloat16(), bias, residual]
    with backend(name):
        got = with_gradients(ours(rows, False), args, grad)
        expected = with_gradients(ours(rows, False), rounded, grad)
    assert [g.dtype for g in got] == [torch.bfloat16, torch.bfloat16, *[torch.float32] * 3]
    for mine, want in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.to(want.dtype), want)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (3, 0, 4), (0, 5, 0)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_batches_and_rows(name, lengths, layout):
    values = torch.tensor(lengths, dtype=torch.int64, device=DEVICE)
    rows = Rows.padded(values, 5) if layout is padded else None
    rows = rows or Rows.packed(values, sum(lengths) + 2 * bool(lengths), max(lengths, default=0))
    args = inputs(rows, 32, 2, 3)
    grad = torch.randn_like(args[0])
    expected = [torch.zeros_like(a) for a in (args[0], *args)]
    if sum(lengths):
        expected = with_gradients(plain(rows, False), args, grad)
    with backend(name), poisoned_memory():
        got = with_gradients(ours(rows, False), args, grad)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("causal", "taps"), [(False, 3), (True, 4)])
def test_gradcheck(name, causal, taps):
    rows = packed((1, 3), tail=1)
    args = [a.double().requires_grad_() for a in inputs(rows, 6, 2, taps, garbage=0)]
    with backend(name):
        assert torch.autograd.gradcheck(ours(rows, causal), args, fast_mode=True)


@pytest.mark.parametrize("causal", [False, True])
def test_written_backward_equals_autograd(causal):
    rows = packed()
    *args, _ = inputs(rows, 32, 2, 5)
    grad = torch.randn_like(args[0])

    def run(x, weight, bias):
        return reference(x, weight, bias, rows, causal=causal)

    expected = with_gradients(run, args, grad)[1:]
    got = _reference_backward(grad, *args, *rows[:3], causal)
    torch.testing.assert_close(list(got), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", kernel_backends())
def test_gradients_are_deterministic(name):
    rows = packed((200, 70))
    args, grad = inputs(rows, 32, 2, 3), torch.randn(275, 32, device=DEVICE)
    with backend(name):
        first, second = (with_gradients(ours(rows, False), args, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["auto", *kernel_backends()])
@pytest.mark.parametrize("with_residual", [False, True])
def test_opcheck(name, with_residual):
    rows = packed((1, 6))
    *args, residual = (a.requires_grad_() for a in inputs(rows, 12, 2, 3, garbage=0))
    with backend(name):
        torch.library.opcheck(_op, (*args, *rows[:3], False, residual if with_residual else None))
        args = [a.detach() for a in args]
        torch.library.opcheck(_op_backward, (torch.randn_like(args[0]), *args, *rows[:3], True))


@pytest.mark.parametrize("name", BACKENDS)
def test_compiles_without_graph_breaks_or_recompiles(name):
    def run(x, weight, bias, residual, starts, lengths, row_of, longest):
        rows = Rows(starts, lengths, row_of, longest)
        return grouped_conv_mish(x, weight, bias, rows, residual=residual)

    with backend(name):
        batches = (packed(lengths) for lengths in ((3, 5, 9, 8), (20, 7, 1, 1, 9), (2, 31, 4) * 3))
        calls = ((*inputs(rows, 12, 2, 3, garbage=0), *rows) for rows in batches)
        assert_compiles_once(run, *calls)


@pytest.mark.parametrize("causal", [False, True])
def test_jvp_on_the_reference(causal):
    rows, step = packed((1, 5), tail=2), 1e-6
    args = [a.double() for a in inputs(rows, 6, 2, 3, garbage=0)]
    tangents = [torch.randn_like(a) for a in args]
    with backend("reference"):
        _, tangent = torch.func.jvp(ours(rows, causal), tuple(args), tuple(tangents))
        ahead, behind = (
            ours(rows, causal)(*(a + s * d for a, d in zip(args, tangents, strict=True)))
            for s in (step, -step)
        )
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", kernel_backends())
@pytest.mark.parametrize("argument", range(4))
def test_forward_mode_ad_is_refused(name, argument):
    rows = packed((2, 3))
    args = inputs(rows, 6, 2, 3)

    def run(value):
        return ours(rows, False)(*args[:argument], value, *args[argument + 1 :])

    with backend(name), pytest.raises(RuntimeError, match="forward-mode AD"):
        torch.func.jvp(run, (args[argument],), (torch.ones_like(args[argument]),))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.zeros(2, 5, 6)}, ValueError, r"x: expected shape \(T, D\)"),
        ({"x": torch.zeros(5, 6, dtype=torch.int32)}, TypeError, "x: expected"),
        ({"weight": torch.zeros(5, 3, 3)}, ValueError, "weight: expected shape"),
        ({"weight": torch.zeros(6, 4, 3)}, ValueError, "weight: .* divide D = 6, got 4"),
        ({"weight": torch.zeros(6, 3, 4)}, ValueError, "weight: expected an odd number"),
        ({"weight": torch.zeros(6, 3, 3, device="meta")}, ValueError, "weight: expected a tensor"),
        ({"bias": torch.zeros(5)}, ValueError, "bias: expected shape"),
        ({"bias": torch.zeros(6, dtype=torch.int64)}, TypeError, "bias: expected"),
        ({"residual": torch.zeros(5, 7)}, ValueError, "residual: expected shape"),
        ({"row_of": torch.zeros(4, dtype=torch.int32)}, ValueError, "rows.row_of: expected shape"),
        ({"starts": torch.zeros(3, dtype=torch.int64)}, TypeError, "rows.starts: expected"),
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, ValueError, "rows.starts: expected shape"),
    ],
)
def test_errors(changed, error, message):
    rows = Rows.packed(torch.tensor([2, 3]), 5, 3)
    rows = rows._replace(**{k: v for k, v in changed.items() if k in Rows._fields})
    given = {"x": torch.zeros(5, 6), "weight": torch.zeros(6, 3, 3), "bias": torch.zeros(6)}
    given |= {k: v for k, v in changed.items() if k not in Rows._fields}
    with pytest.raises(error, match=message):
        grouped_conv_mish(**given, rows=rows)
