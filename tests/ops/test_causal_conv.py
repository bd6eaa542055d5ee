import pytest
import torch
from torch.nn import functional as F

from imf_kernels.ops import causal_conv, causal_conv_norm
from imf_kernels.ops.causal_conv import _op, _op_norm_backward, _reference_norm_backward, reference
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

PATHS = ["reference", *kernel_backends()]
LENGTHS = [[1], [17, 1, 40], [63, 100], [2, 33]]
WIDTHS = [(3, 7), (20, 16), (80, 256), (17, 100)]
"""Channels in and out."""


def inputs(rows: Rows, frames: int, channels: int, dim: int, dtype=torch.float32, taps=3):
    """x, weight (a slice of the input channels), bias, gamma, beta, addend, shift, residual."""
    count = len(rows.lengths)
    given = [
        poisoned(torch.randn(frames, channels, device=DEVICE), rows),
        torch.randn(dim, channels + 7, taps, device=DEVICE)[:, 2:-5] / (taps * channels) ** 0.5,
        *torch.randn(3, dim, device=DEVICE).unbind(),
        poisoned(torch.randn(frames, 2 * dim, device=DEVICE), rows),
        torch.randn(count, 3, dim, device=DEVICE)[:, 1],
        poisoned(torch.randn(frames, dim, device=DEVICE), rows),
    ]
    x, weight, bias, gamma, beta, addend, shift, residual = (t.to(dtype) for t in given)
    return [x, weight, bias, gamma, beta, addend[:, dim:], shift, residual]


def block(rows):
    def run(x, weight, bias, gamma, beta, addend, shift, residual):
        around = {"addend": addend, "shift": shift, "residual": residual}
        return causal_conv_norm(x, weight, bias, gamma, beta, rows, **around)

    return run


def conv(rows):
    def run(x, weight, bias, addend):
        return causal_conv(x, weight, bias, rows, addend)

    return run


def plain_conv(x, weight, bias, addend):
    """One row in same-dtype PyTorch, as the clients write it."""
    x = F.pad(x.t()[None], (weight.shape[2] - 1, 0))
    return F.conv1d(x, weight, bias)[0].t() + addend


def plain(x, weight, bias, gamma, beta, addend, shift, residual):
    h = plain_conv(x, weight, bias, addend)
    return F.mish(F.layer_norm(h, gamma.shape, gamma, beta, 1e-5)) + shift + residual


def one_of(args, rows, row):
    """What a row alone is given; the shift, if there is one, is the one before last."""
    frames = len(rows.row_of)
    alone = [rows_of(a, rows)[row] if len(a) == frames and a.ndim == 2 else a for a in args]
    if len(args) == 8:
        alone[6] = args[6][row : row + 1]
    return alone


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(("lengths", "widths"), list(zip(LENGTHS, WIDTHS, strict=True)))
@pytest.mark.parametrize("norm", [True, False])
def test_outputs_and_gradients_follow_the_error_rule(name, dtype, kind, lengths, widths, norm):
    if name == "reference" and dtype in HALF:
        pytest.skip("as plain as the clients' code, rounded in other places")
    rows, frames = layout(kind, lengths, spare=4)
    args = inputs(rows, frames, *widths, dtype)
    args = args if norm else [*args[:3], args[5]]
    op, client = (block, plain) if norm else (conv, plain_conv)
    grad = torch.randn(frames, widths[1], device=DEVICE).to(dtype)
    with backend(name), poisoned_memory():
        ours = with_gradients(op(rows), args, grad)
    shared = slice(2, 6 if norm else 4)  # weight, bias, gamma, beta
    exact_sums, plain_sums = [], []
    for i, grad_i in enumerate(rows_of(grad, rows)):
        one = one_of(args, rows, i)
        exact = with_gradients(client, [a.double() for a in one], grad_i.double())
        same_dtype = with_gradients(client, one, grad_i)
        for k, mine in enumerate(ours):
            if args[k - 1].ndim == 2:  # also the output, k = 0: of each frame
                assert mine.dtype == dtype
                of_row = rows_of(mine, rows)[i] if len(mine) == frames else mine[i : i + 1]
                atol = 2e-6 * len(grad_i) * float(exact[k].abs().max())
                assert_error_rule(of_row, same_dtype[k], exact[k], atol)
        exact_sums.append(exact[shared])
        plain_sums.append(same_dtype[shared])
    for k in (k for k, a in enumerate([ours[0], *args]) if len(a) == frames):
        assert_nothing_else(ours[k], rows)
    for mine, plain_k, exact_k in zip(
        ours[shared], zip(*plain_sums, strict=True), zip(*exact_sums, strict=True), strict=True
    ):
        true = sum(exact_k)
        allowed = sum(p.double() for p in plain_k)
        rounding = 1e-5 + torch.finfo(dtype).eps  # of the sum over rows
        assert_error_rule(mine, allowed, true, rounding * float(true.abs().max()))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_batch_equals_its_rows_bit_for_bit(name, kind):
    rows, frames = layout(kind, [70, 1, 33])
    args = inputs(rows, frames, 24, 48)
    with backend(name):
        together = block(rows)(*args)
        for i, length in enumerate(rows.lengths.tolist()):
            got = block(alone(length))(*one_of(args, rows, i))
            if name == "reference":  # the library's product is another for another shape
                torch.testing.assert_close(rows_of(together, rows)[i], got, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(rows_of(together, rows)[i], got)


@pytest.mark.parametrize("name", PATHS)
def test_nothing_is_read_before_a_rows_start(name):
    """A row whose neighbours are NaN, or huge, gives what it gives alone."""
    rows, frames = layout("packed", [9, 20, 11])
    args = inputs(rows, frames, 6, 16)
    with backend(name):
        want = rows_of(block(rows)(*args), rows)[1]
        for neighbour in (0, 2):
            rows_of(args[0], rows)[neighbour].fill_(torch.nan)
        got = rows_of(block(rows)(*args), rows)[1]
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", PATHS)
def test_closed_form(name):
    """The last taps of a row; then mish(beta), the norm of a single channel being 0."""
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 1.0], [4.0, 0.0]], device=DEVICE)
    weight = torch.tensor([[[100.0, 10.0, 1.0], [0.0, 0.0, -1.0]]], device=DEVICE)
    rows = Rows.packed(torch.tensor([3, 1], device=DEVICE), 4, 3)
    one = torch.ones(1, device=DEVICE)
    with backend(name):
        h = causal_conv(x, weight, 0.5 * one, rows)
        y = causal_conv_norm(x, weight, None, one, one, rows, residual=10 * x[:, :1])
    torch.testing.assert_close(h[:, 0].cpu(), torch.tensor([1.5, 12.5, 122.5, 4.5]))
    torch.testing.assert_close(y, 10 * x[:, :1] + F.mish(one))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("taps", [1, 2, 3, 5])
def test_taps(name, taps):
    rows, frames = layout("padded", [11, 4])
    args = inputs(rows, frames, 6, 20, taps=taps)
    with backend(name):
        got = block(rows)(*args)
    for i in range(2):
        want = plain(*one_of(args, rows, i))
        torch.testing.assert_close(rows_of(got, rows)[i], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PATHS)
def test_one_shift_for_all_rows(name):
    rows, frames = layout("packed", [20, 7])
    args = inputs(rows, frames, 12, 32)
    shared = [*args[:6], args[6][:1], args[7]]
    repeated = [*args[:6], args[6][:1].repeat(2, 1), args[7]]
    grad = torch.randn(frames, 32, device=DEVICE)
    with backend(name):
        got, want = (with_gradients(block(rows), a, grad) for a in (shared, repeated))
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[7], want[7].sum(0, keepdim=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PATHS)
def test_strided_views(name):
    rows, frames = layout("padded", [12], spare=0)
    args = inputs(rows, frames, 10, 16)
    grad = torch.randn(frames, 16, device=DEVICE)
    views = [torch.stack([a, a], dim=-1)[..., 0] for a in args]
    views[6] = args[6]
    with backend(name):
        got = with_gradients(block(rows), views, grad.mT.contiguous().mT)
        want = with_gradients(block(rows), args, grad)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PATHS)
def test_gradcheck(name):
    rows, frames = layout("packed", [2, 4])
    args = [torch.nan_to_num(a).double().requires_grad_() for a in inputs(rows, frames, 3, 5)]
    fast = name != "reference"  # the interpreter is slow
    with backend(name):
        assert torch.autograd.gradcheck(block(rows), args, fast_mode=fast)
        assert torch.autograd.gradcheck(conv(rows), [*args[:3], args[5]], fast_mode=fast)


def test_written_backward_equals_autograd():
    rows, frames = layout("padded", [7, 4])
    x, _, bias, gamma, beta, *_ = inputs(rows, frames, 6, 6)
    grad, identity = torch.randn(frames, 6, device=DEVICE), torch.eye(6, device=DEVICE)[:, :, None]

    def run(x, gamma, beta, bias):
        return reference(x, identity, bias, None, (gamma, beta), None, None, rows, 1e-5)[0]

    _, *expected = with_gradients(run, [x, gamma, beta, bias], grad)
    grad_h, sums = _reference_norm_backward(grad, x + bias, gamma, beta, rows, 1e-5)
    for got, want in zip((grad_h, *sums[:3].sum(1)), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PATHS)
def test_gradients_are_deterministic(name):
    rows, frames = layout("packed", [70, 50])
    args, grad = inputs(rows, frames, 8, 32), torch.randn(frames, 32, device=DEVICE)
    with backend(name):
        first, second = (with_gradients(block(rows), args, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", PATHS)
def test_without_gradients_the_result_is_the_same(name):
    rows, frames = layout("packed", [33])
    args = inputs(rows, frames, 8, 32, torch.bfloat16)
    grad = torch.zeros(frames, 32, device=DEVICE)
    with backend(name):
        assert torch.equal(block(rows)(*args), with_gradients(block(rows), args, grad)[0])


@pytest.mark.parametrize("name", PATHS)
def test_empty(name):
    rows, frames = layout("packed", [], spare=0)
    args = inputs(rows, frames, 4, 8)
    with backend(name):
        _, *grads = with_gradients(block(rows), args, torch.zeros(0, 8, device=DEVICE))
    assert all(float(grad.abs().sum()) == 0 for grad in grads)


@pytest.mark.parametrize("name", kernel_backends())
def test_opcheck(name):
    rows, frames = layout("packed", [5, 3], spare=0)
    x, weight, bias, gamma, beta, addend, shift, residual = inputs(rows, frames, 6, 16)
    with backend(name):
        leaf = x.clone().requires_grad_()
        arguments = (leaf, weight, bias, addend, gamma, beta, shift, residual)
        torch.library.opcheck(_op, (*arguments, *rows, 1e-5, True))
        torch.library.opcheck(_op, (x, weight, *[None] * 6, *rows, 1e-5, False))
        h = torch.randn_like(residual)
        torch.library.opcheck(_op_norm_backward, (residual, h, gamma, beta, *rows, 1e-5))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("grad", [False, True])
def test_compiles_without_graph_breaks_or_recompiles(name, grad):
    def run(x, weight, bias, gamma, beta, addend, shift, residual, lengths):
        rows = Rows.padded(lengths, len(x) // 2)
        return block(rows)(x, weight, bias, gamma, beta, addend, shift, residual)

    def call(frames):
        rows, total = layout("padded", [frames, frames - 2], spare=0)
        args = [torch.nan_to_num(a) for a in inputs(rows, total, 6, 16)]
        args[1] = args[1].requires_grad_(grad)
        return *args, rows.lengths.long()

    with backend(name):
        assert_compiles_once(run, *(call(frames) for frames in (7, 12, 33)))


@pytest.mark.parametrize("name", PATHS)
def test_autocast_casts_as_for_any_product(name):
    rows, frames = layout("packed", [33, 5])
    args = inputs(rows, frames, 8, 32)
    half = [*(a.bfloat16() for a in args[:3]), *args[3:]]
    with backend(name):
        want = block(rows)(*half)
        with torch.autocast(DEVICE, torch.bfloat16):
            got = with_gradients(block(rows), args, torch.ones_like(want))
    assert torch.equal(got[0], want)
    assert all(grad.dtype == torch.float32 for grad in got[1:])


def test_jvp_on_the_reference():
    rows, frames = layout("padded", [3, 5], spare=0)
    args = [a.double() for a in inputs(rows, frames, 4, 6)]
    tangents = [torch.randn_like(a) for a in args]
    step = 1e-6
    with backend("reference"):
        _, tangent = torch.func.jvp(block(rows), tuple(args), tuple(tangents))
        ahead, behind = (
            block(rows)(*(a + s * d for a, d in zip(args, tangents, strict=True)))
            for s in (step, -step)
        )
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", kernel_backends())
@pytest.mark.parametrize("argument", range(8))
def test_forward_mode_ad_is_refused(name, argument):
    rows, frames = layout("packed", [3])
    args = inputs(rows, frames, 4, 16)

    def run(value):
        return block(rows)(*args[:argument], value, *args[argument + 1 :])

    tangent = torch.ones_like(args[argument])
    with backend(name), pytest.raises(RuntimeError, match="forward-mode AD"):
        torch.func.jvp(run, (args[argument],), (tangent,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8, 5)}, "weight: expected shape"),
        ({"x": torch.zeros(8, 4).int()}, "x: expected torch.float32"),
        ({"weight": torch.zeros(16, 4, 3).half()}, "weight: expected torch.float32, got"),
        ({"bias": torch.zeros(4)}, r"bias: expected shape \(16,\)"),
        ({"gamma": torch.zeros(16).int()}, "gamma: expected torch.float32"),
        ({"addend": torch.zeros(7, 16)}, r"addend: expected shape \(8, 16\)"),
        ({"shift": torch.zeros(3, 16)}, r"shift: expected shape \(2, 16\)"),
        ({"residual": torch.zeros(8, 4)}, r"residual: expected shape \(8, 16\)"),
        ({"rows": None}, "rows: expected Rows"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {
        "x": torch.zeros(8, 4),
        "weight": torch.zeros(16, 4, 3),
        "bias": None,
        "gamma": torch.ones(16),
        "beta": torch.ones(16),
        "rows": Rows.padded(torch.tensor([4, 3]), 4),
    }
    with pytest.raises((TypeError, ValueError), match=message):
        causal_conv_norm(**given | change)
