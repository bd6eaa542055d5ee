import pytest
import torch
from torch.nn import functional as F

from imf_kernels.ops import depthwise_conv_norm
from imf_kernels.ops.depthwise_conv import _op
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
LENGTHS = [[1], [17, 0, 1, 40], [63, 100], [2, 33]]
DIMS = [3, 80, 192, 256]


def inputs(rows: Rows, frames: int, dim: int, dtype=torch.float32, taps=7):
    """x, weight, bias, gamma and beta."""
    x = poisoned(torch.randn(frames, dim, device=DEVICE), rows)
    weight = torch.randn(dim, 1, taps, device=DEVICE) / taps**0.5
    return [t.to(dtype) for t in (x, weight, *torch.randn(3, dim, device=DEVICE).unbind())]


def op(rows):
    def run(x, weight, bias, gamma, beta):
        return depthwise_conv_norm(x, weight, bias, gamma, beta, rows)

    return run


def plain(x, weight, bias, gamma, beta):
    """One row in same-dtype PyTorch, as F5-TTS writes it."""
    z = F.conv1d(x.t()[None], weight, bias, padding=weight.shape[2] // 2, groups=len(weight))
    return F.layer_norm(z[0].t(), gamma.shape, gamma, beta, 1e-6)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(("lengths", "dim"), list(zip(LENGTHS, DIMS, strict=True)))
def test_outputs_and_gradients_follow_the_error_rule(name, dtype, kind, lengths, dim):
    rows, frames = layout(kind, lengths, spare=4)
    args = inputs(rows, frames, dim, dtype)
    grad = torch.randn(frames, dim, device=DEVICE).to(dtype)
    with backend(name), poisoned_memory():
        ours = with_gradients(op(rows), args, grad)
    sums = [[0.0] * 4, [0.0] * 4]
    spans = zip(rows_of(args[0], rows), rows_of(grad, rows), strict=True)
    for i, (x, grad_row) in enumerate(spans):
        if not len(x):
            continue
        exact = with_gradients(plain, [a.double() for a in (x, *args[1:])], grad_row.double())
        same_dtype = with_gradients(plain, [x, *args[1:]], grad_row)
        for k in (0, 1):
            assert ours[k].dtype == dtype
            atol = 4e-6 * float(exact[k].abs().max())
            assert_error_rule(rows_of(ours[k], rows)[i], same_dtype[k], exact[k], atol)
        for total, found in zip(sums, (same_dtype, exact), strict=True):
            total[:] = [a + b.double() for a, b in zip(total, found[2:], strict=True)]
    for mine, allowed, exact in zip(ours[2:], *sums, strict=True):
        rounding = 1e-5 + torch.finfo(dtype).eps  # of the sum over rows
        assert_error_rule(mine, allowed, exact, rounding * float(exact.abs().max()))
    for k in (0, 1):
        assert_nothing_else(ours[k], rows)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_batch_equals_its_rows_bit_for_bit(name, kind):
    rows, frames = layout(kind, [70, 1, 33])
    args = inputs(rows, frames, 48)
    with backend(name):
        together = rows_of(op(rows)(*args), rows)
        for x, y in zip(rows_of(args[0], rows), together, strict=True):
            got = op(alone(len(x)))(x, *args[1:])
            if name == "reference":  # the library may add up another way for another shape
                torch.testing.assert_close(got, y, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(got, y)


@pytest.mark.parametrize("name", PATHS)
def test_nothing_is_read_of_another_row(name):
    rows, frames = layout("packed", [9, 20, 11], spare=0)
    args = inputs(rows, frames, 16)
    with backend(name):
        want = rows_of(op(rows)(*args), rows)[1]
        for neighbour in (0, 2):
            rows_of(args[0], rows)[neighbour].fill_(torch.nan)
        got = rows_of(op(rows)(*args), rows)[1]
    assert torch.equal(got, want) or name == "reference"
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("taps", [1, 3, 31])
def test_taps(name, taps):
    rows, frames = layout("packed", [11, 4])
    args = inputs(rows, frames, 20, taps=taps)
    with backend(name):
        got = rows_of(op(rows)(*args), rows)
    for x, y in zip(rows_of(args[0], rows), got, strict=True):
        torch.testing.assert_close(y, plain(x, *args[1:]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PATHS)
def test_strided_views(name):
    rows, frames = layout("padded", [12], spare=0)
    args, grad = inputs(rows, frames, 16), torch.randn(frames, 16, device=DEVICE)
    views = [torch.stack([a, a], dim=-1)[..., 0] for a in args]
    with backend(name):
        got = with_gradients(op(rows), views, grad.mT.contiguous().mT)
        want = with_gradients(op(rows), args, grad)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PATHS)
def test_gradcheck(name):
    rows, frames = layout("packed", [2, 4])
    args = [torch.nan_to_num(a).double().requires_grad_() for a in inputs(rows, frames, 5)]
    with backend(name):  # the interpreter is slow
        assert torch.autograd.gradcheck(op(rows), args, fast_mode=name != "reference")


@pytest.mark.parametrize("name", PATHS)
def test_gradients_are_deterministic(name):
    rows, frames = layout("packed", [70, 50])
    args, grad = inputs(rows, frames, 32), torch.randn(frames, 32, device=DEVICE)
    with backend(name):
        first, second = (with_gradients(op(rows), args, grad) for _ in range(2))
    assert name == "reference" or all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", PATHS)
def test_empty(name):
    rows, frames = layout("packed", [], spare=0)
    with backend(name):
        _, *grads = with_gradients(op(rows), inputs(rows, frames, 8), torch.zeros(0, 8))
    assert all(float(grad.abs().sum()) == 0 for grad in grads)


@pytest.mark.parametrize("name", kernel_backends())
def test_opcheck(name):
    rows, frames = layout("packed", [5, 3], spare=0)
    x, *weights = inputs(rows, frames, 6)
    with backend(name):
        torch.library.opcheck(_op, (x.requires_grad_(), *weights, *rows, 1e-6))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("grad", [False, True])
def test_compiles_without_graph_breaks_or_recompiles(name, grad):
    def run(x, weight, bias, gamma, beta, lengths):
        rows = Rows.padded(lengths, len(x) // 2)
        return depthwise_conv_norm(x, weight, bias, gamma, beta, rows)

    def call(frames):
        rows, total = layout("padded", [frames, frames - 2], spare=0)
        args = [torch.nan_to_num(a) for a in inputs(rows, total, 16)]
        return args[0], args[1].requires_grad_(grad), *args[2:], rows.lengths.long()

    with backend(name):
        assert_compiles_once(run, *(call(frames) for frames in (7, 12, 33)))


def test_jvp_on_the_reference():
    rows, frames = layout("padded", [3, 5], spare=0)
    args = [torch.nan_to_num(a).double() for a in inputs(rows, frames, 4)]
    tangents = [torch.randn_like(a) for a in args]
    step = 1e-6
    with backend("reference"):
        _, tangent = torch.func.jvp(op(rows), tuple(args), tuple(tangents))
        ahead, behind = (
            op(rows)(*(a + s * d for a, d in zip(args, tangents, strict=True)))
            for s in (step, -step)
        )
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", kernel_backends())
@pytest.mark.parametrize("argument", range(5))
def test_forward_mode_ad_is_refused(name, argument):
    rows, frames = layout("packed", [3])
    args = inputs(rows, frames, 4)

    def run(value):
        return op(rows)(*args[:argument], value, *args[argument + 1 :])

    tangent = torch.ones_like(args[argument])
    with backend(name), pytest.raises(RuntimeError, match="forward-mode AD"):
        torch.func.jvp(run, (args[argument],), (tangent,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8, 4).int()}, "x: expected torch.float32"),
        ({"x": torch.zeros(8, 5)}, r"weight: expected shape \(5, 1, K\)"),
        ({"weight": torch.zeros(4, 1, 6)}, "weight: expected an odd number of taps K, got 6"),
        ({"weight": torch.zeros(4, 1, 7).int()}, "weight: expected torch.float32"),
        ({"bias": torch.zeros(5)}, r"bias: expected shape \(4,\)"),
        ({"beta": None}, "beta: expected"),
        ({"rows": None}, "rows: expected Rows"),
    ],
)
def test_bad_input_is_named(change, message):
    vectors = {name: torch.zeros(4) for name in ("bias", "gamma", "beta")}
    given = {"x": torch.zeros(8, 4), "weight": torch.zeros(4, 1, 7), **vectors}
    given |= {"rows": Rows.padded(torch.tensor([4, 3]), 4)}
    with pytest.raises((TypeError, ValueError), match=message):
        depthwise_conv_norm(**given | change)
