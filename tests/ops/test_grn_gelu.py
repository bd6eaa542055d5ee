import pytest
import torch
from torch.nn import functional as F

from imf_kernels.ops import grn_gelu
from imf_kernels.ops.grn_gelu import _op, _op_sums
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
LENGTHS = [[1], [17, 0, 1, 40], [63, 100], [2, 33], [300]]
DIMS = [3, 80, 192, 256, 100]


def inputs(rows: Rows, frames: int, dim: int, dtype=torch.float32):
    """h, gamma and beta."""
    h = poisoned(torch.randn(frames, dim, device=DEVICE), rows)
    return [t.to(dtype) for t in (h, *torch.randn(2, dim, device=DEVICE).unbind())]


def op(rows):
    def run(h, gamma, beta):
        return grn_gelu(h, gamma, beta, rows)

    return run


def plain(h, gamma, beta):
    """One row in same-dtype PyTorch, as F5-TTS writes it."""
    x = F.gelu(h)
    norms = torch.linalg.vector_norm(x, dim=0, keepdim=True)
    return gamma * (x * (norms / (norms.mean(dim=-1, keepdim=True) + 1e-6))) + beta + x


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
    sums = [[0.0] * 2, [0.0] * 2]
    spans = zip(rows_of(args[0], rows), rows_of(grad, rows), strict=True)
    for i, (h, grad_row) in enumerate(spans):
        if not len(h):
            continue
        exact = with_gradients(plain, [a.double() for a in (h, *args[1:])], grad_row.double())
        same_dtype = with_gradients(plain, [h, *args[1:]], grad_row)
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
    rows, frames = layout(kind, [70, 1, 33, 17])
    args = inputs(rows, frames, 48)
    with backend(name):
        together = rows_of(op(rows)(*args), rows)
        for h, y in zip(rows_of(args[0], rows), together, strict=True):
            got = op(alone(len(h)))(h, *args[1:])
            if name == "reference":  # libraries vectorise another way for another shape
                torch.testing.assert_close(got, y, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(got, y)


@pytest.mark.parametrize("name", PATHS)
def test_closed_form(name):
    """Two rows of equal norms in all channels: half as much again, but for the 1e-6."""
    h = torch.tensor([[30.0, 40.0], [40.0, -30.0], [40.0, 30.0], [30.0, 50.0]], device=DEVICE)
    gamma, beta = torch.full((2, 2), 0.5, device=DEVICE).unbind()
    h[1, 1] = 30.0
    rows = Rows.packed(torch.tensor([2, 1], device=DEVICE), 4, 2)
    with backend(name):
        y = grn_gelu(h, gamma, beta, rows)
    torch.testing.assert_close(y[:2], 1.5 * h[:2] + 0.5)
    gain = 1 + 0.5 * h[2] / 35
    torch.testing.assert_close(y[2:], torch.stack([h[2] * gain + 0.5, torch.zeros_like(h[3])]))


@pytest.mark.parametrize("name", PATHS)
def test_channels_of_nothing_have_finite_gradients(name):
    rows, frames = layout("packed", [5, 0, 4])
    args = inputs(rows, frames, 12)
    args[0][:, 3] = 0.0
    args[0][:5] = 0.0
    with backend(name):
        outputs = with_gradients(op(rows), args, torch.ones(frames, 12, device=DEVICE))
    assert all(tensor.isfinite().all() for tensor in outputs)


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
    h, gamma, beta = inputs(rows, frames, 6)
    with backend(name):
        torch.library.opcheck(_op_sums, (h, torch.randn_like(h), *rows))
        torch.library.opcheck(_op, (h.requires_grad_(), gamma, beta, *rows))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("grad", [False, True])
def test_compiles_without_graph_breaks_or_recompiles(name, grad):
    def run(h, gamma, beta, lengths):
        return grn_gelu(h, gamma, beta, Rows.padded(lengths, len(h) // 2))

    def call(frames):
        rows, total = layout("padded", [frames, frames - 2], spare=0)
        h, gamma, beta = inputs(rows, total, 16)
        return h, gamma.requires_grad_(grad), beta, rows.lengths.long()

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
@pytest.mark.parametrize("argument", range(3))
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
        ({"h": torch.zeros(8, 4).int()}, "h: expected torch.float32"),
        ({"h": torch.zeros(2, 4, 4)}, "h: expected shape"),
        ({"gamma": torch.zeros(1, 1, 4)}, r"gamma: expected shape \(4,\)"),
        ({"beta": None}, "beta: expected"),
        ({"rows": None}, "rows: expected Rows"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {"h": torch.zeros(8, 4), "gamma": torch.zeros(4), "beta": torch.zeros(4)}
    given |= {"rows": Rows.padded(torch.tensor([4, 3]), 4)}
    with pytest.raises((TypeError, ValueError), match=message):
        grn_gelu(**given | change)
