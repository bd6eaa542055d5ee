import pytest
import torch

from imf_kernels.ops import (
    gated_residual_norm,
    gated_residual_norm_fp8,
    modulated_layer_norm,
    modulated_layer_norm_fp8,
    residual_layer_norm,
)
from imf_kernels.ops.modulated_layer_norm import (
    _op,
    _op_backward,
    _op_fp8,
    _reference_backward,
    reference,
)
from imf_kernels.ops.quantize_rows import FP8
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

BACKENDS = kernel_backends(cpp=True)
LENGTHS = [[1], [17, 1, 40], [63, 100]]
DIMS = [3, 80, 192, 256]


def inputs(rows: Rows | None, frames: int, dim: int, dtype=torch.float32, modulations=None):
    """x, h, and gate, shift and scale as strided views of one modulation."""
    count = modulations or (1 if rows is None else len(rows.lengths))
    x, h = (2 * torch.randn(2, frames, dim, device=DEVICE) + 0.5).to(dtype)
    if rows is not None:
        x, h = poisoned(x, rows), poisoned(h, rows)
    modulation = torch.randn(count, 6 * dim, device=DEVICE).to(dtype)
    gate, shift, _, scale, _, _ = modulation.chunk(6, dim=1)
    return [x, h, gate, shift, scale]


def both(rows):
    """The two results side by side: x' and y."""

    def run(*args):
        return torch.stack(gated_residual_norm(*args, rows))

    return run


def plain(x, h, gate, shift, scale):
    """One row in same-dtype PyTorch, as the clients write it."""
    x = x + gate * h
    norm = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    return torch.stack([x, norm * (1 + scale) + shift])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(("lengths", "dim"), list(zip(LENGTHS * 2, DIMS + DIMS[:2], strict=True)))
def test_outputs_and_gradients_follow_the_error_rule(name, dtype, kind, lengths, dim):
    rows, frames = layout(kind, lengths)
    args = inputs(rows, frames, dim, dtype)
    grad = torch.randn(2, frames, dim, device=DEVICE).to(dtype)
    with backend(name), poisoned_memory():
        ours = with_gradients(both(rows), args, grad)
    for result in (ours[0][0], ours[0][1], ours[1], ours[2]):
        assert_nothing_else(result, rows)
    x, h, *modulations = args
    spans = zip(*(rows_of(t, rows) for t in (x, h, grad[0], grad[1])), strict=True)
    for i, (x_i, h_i, *grads) in enumerate(spans):
        one = [x_i, h_i, *(m[i : i + 1] for m in modulations)]
        exact = with_gradients(plain, [a.double() for a in one], torch.stack(grads).double())
        same_dtype = with_gradients(plain, one, torch.stack(grads))
        out, grad_x, grad_h, *grad_m = ours
        got = [torch.stack([rows_of(o, rows)[i] for o in out])]
        got += [rows_of(grad_x, rows)[i], rows_of(grad_h, rows)[i], *(g[i : i + 1] for g in grad_m)]
        for mine, allowed, true in zip(got, same_dtype, exact, strict=True):
            assert mine.dtype == dtype
            assert_error_rule(mine, allowed, true, atol=1e-6 * len(x_i) * float(true.abs().max()))


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_one_modulation_for_all_rows(name, kind):
    rows, frames = layout(kind, [20, 7])
    args = inputs(rows, frames, 32, modulations=1)
    repeated = [*args[:2], *(m.repeat(2, 1) for m in args[2:])]
    grad = torch.randn(2, frames, 32, device=DEVICE)
    with backend(name):
        got = with_gradients(both(rows), args, grad)
        want = with_gradients(both(rows), repeated, grad)
    assert torch.equal(got[0], want[0])
    for ours, apart in zip(got[3:], want[3:], strict=True):
        torch.testing.assert_close(ours, apart.sum(0, keepdim=True), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_without_rows_all_frames_are_one(name):
    args, grad = inputs(None, 33, 24), torch.randn(2, 33, 24, device=DEVICE)
    with backend(name):
        got = with_gradients(both(None), args, grad)
        want = with_gradients(both(alone(33)), args, grad)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_the_norm_alone_is_the_norm_of_the_residual(name):
    rows, frames = layout("packed", [5, 30])
    x, h, gate, shift, scale = inputs(rows, frames, 48)
    grad = torch.randn(frames, 48, device=DEVICE)
    with backend(name):
        x_out, y = gated_residual_norm(x, h, gate, shift, scale, rows)
        again, *grads = with_gradients(
            lambda *a: modulated_layer_norm(*a, rows), [x_out, shift, scale], grad
        )
        with backend("reference"):
            wanted = with_gradients(
                lambda *a: modulated_layer_norm(*a, rows), [x_out, shift, scale], grad
            )[1:]
    torch.testing.assert_close(again, y)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_closed_form():
    x = torch.tensor([[0.0, 1.0]], device=DEVICE)
    h, gate = torch.tensor([[1.0, 4.0]], device=DEVICE), torch.tensor([[1.0, 0.5]], device=DEVICE)
    shift, scale = torch.tensor([[[10.0, 20.0]], [[0.0, 1.0]]], device=DEVICE)
    x_out, y = gated_residual_norm(x, h, gate, shift, scale, eps=0.0)
    torch.testing.assert_close(x_out, torch.tensor([[1.0, 3.0]], device=DEVICE))
    torch.testing.assert_close(y, torch.tensor([[9.0, 22.0]], device=DEVICE))


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_strided_views(name):
    """Transposed frames, and a gradient that comes in transposed."""
    args, grad = inputs(None, 12, 10), torch.randn(2, 12, 10, device=DEVICE)
    expected = with_gradients(both(None), args, grad)
    views = [a.mT.contiguous().mT if len(a) == 12 else a for a in args]
    with backend(name):
        got = with_gradients(both(None), views, grad.mT.contiguous().mT)
    for ours, want in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
def test_gradcheck(name):
    rows, frames = layout("packed", [2, 1], spare=0)
    args = [a.double().requires_grad_() for a in inputs(rows, frames, 5)]
    with backend(name):
        assert torch.autograd.gradcheck(both(rows), args)


def test_written_backward_equals_autograd():
    rows, frames = layout("padded", [7, 4])
    args = [torch.nan_to_num(a, 0.3) for a in inputs(rows, frames, 6)]
    grad = torch.randn(2, frames, 6, device=DEVICE)

    def run(*args):
        return torch.stack(reference(*args, rows, 1e-6))

    (x_out, _), *expected = with_gradients(run, args, grad)
    _, h, gate, _, scale = args
    grad_x, grad_h, sums = _reference_backward(*grad, x_out, h, gate, scale, rows, 1e-6)
    for got, want in zip((grad_x, grad_h, *sums.roll(1, 0)), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_are_deterministic(name):
    rows, frames = layout("packed", [70, 50])
    args, grad = inputs(rows, frames, 64), torch.randn(2, frames, 64, device=DEVICE)
    with backend(name):
        first, second = (with_gradients(both(rows), args, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_empty(name):
    rows, frames = layout("packed", [], spare=0)
    with backend(name):
        grads = with_gradients(
            both(rows), inputs(rows, frames, 8), torch.zeros(2, 0, 8, device=DEVICE)
        )
    assert all(float(grad.abs().sum()) == 0 for grad in grads)


@pytest.mark.parametrize("name", BACKENDS)
def test_opcheck(name):
    rows, frames = layout("packed", [5, 3], spare=0)
    x, h, gate, shift, scale = inputs(rows, frames, 12)
    x_out = torch.randn_like(x)
    with backend(name):
        arguments = (x.requires_grad_(), h, gate, shift, scale, *rows, 1e-6, False)
        torch.library.opcheck(_op, arguments)
        nothing = (None, None, None, 0)
        torch.library.opcheck(_op, (x, None, None, shift[:1], scale[:1], *nothing, 1e-6, False))
        torch.library.opcheck(_op, (x, h, None, shift[:1], scale[:1], *nothing, 1e-6, True))
        grads = (x_out, x_out, x_out, h, gate, scale, *rows, 1e-6, False)
        torch.library.opcheck(_op_backward, grads)
        plain_grads = (x_out, x_out, x_out, h, None, scale[:1], *nothing, 1e-6, True)
        torch.library.opcheck(_op_backward, plain_grads)


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_compiles_without_graph_breaks_or_recompiles(name):
    def run(x, h, gate, shift, scale, lengths):
        return gated_residual_norm(x, h, gate, shift, scale, Rows.padded(lengths, len(x) // 2))

    def call(frames):
        rows, total = layout("padded", [frames, frames - 2], spare=0)
        x, h, *modulation = inputs(rows, total, 12)
        return torch.nan_to_num(x), torch.nan_to_num(h), *modulation, rows.lengths.long()

    with backend(name):
        assert_compiles_once(run, *(call(frames) for frames in (7, 12, 33)))


def affine(x, h, weight, bias):
    return torch.stack(residual_layer_norm(x, h, weight, bias))


def plain_affine(x, h, weight, bias):
    x = x + h
    return torch.stack([x, torch.nn.functional.layer_norm(x, weight.shape, weight, bias, 1e-5)])


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("frames", "dim"), [(1, 3), (17, 80), (63, 256), (100, 192), (0, 8)])
def test_the_affine_form_follows_the_error_rule(name, dtype, frames, dim):
    x, h = (2 * torch.randn(2, frames, dim, device=DEVICE) + 0.5).to(dtype)
    args = [x, h, *torch.randn(2, dim, device=DEVICE).to(dtype)]
    grad = torch.randn(2, frames, dim, device=DEVICE).to(dtype)
    exact = with_gradients(plain_affine, [a.double() for a in args], grad.double())
    same_dtype = with_gradients(plain_affine, args, grad)
    with backend(name), poisoned_memory():
        ours = with_gradients(affine, args, grad)
        again = with_gradients(affine, args, grad)
    for mine, allowed, true, repeated in zip(ours, same_dtype, exact, again, strict=True):
        assert mine.dtype == dtype
        assert torch.equal(mine, repeated)
        scale = float(true.abs().max()) if true.numel() else 0.0
        assert_error_rule(mine, allowed, true, atol=2e-6 * max(frames, 1) * scale)


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
def test_the_affine_form_takes_views_and_passes_gradcheck(name):
    x, h = torch.randn(2, 6, 10, device=DEVICE, dtype=torch.float64)[:, :, ::2]
    h, (weight, bias) = h.mT.contiguous().mT, x.new_ones(2, 5).cumsum(1)
    with backend(name):
        leaves = [a.detach().requires_grad_() for a in (x, h, weight, bias)]
        assert torch.autograd.gradcheck(affine, leaves)
        torch.testing.assert_close(affine(x, h, weight, bias), plain_affine(x, h, weight, bias))


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
def test_the_affine_form_compiles(name):
    def call(frames):
        return (*torch.randn(2, frames, 12, device=DEVICE), *torch.randn(2, 12, device=DEVICE))

    with backend(name):
        assert_compiles_once(residual_layer_norm, *(call(frames) for frames in (7, 12, 33)))


def test_bad_affine_input_is_named():
    x, weight = torch.zeros(3, 4), torch.ones(4)
    for given, message in (
        ((x, x[:2], weight, weight), r"h: expected shape \(3, 4\)"),
        ((x, x, weight[:2], weight), r"weight: expected shape \(4,\)"),
        ((x, x, weight, weight[:, None]), r"bias: expected shape \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            residual_layer_norm(*given)


def test_jvp_on_the_reference():
    args = [a.double() for a in inputs(None, 3, 4)]
    tangents = [torch.randn_like(a) for a in args]
    step = 1e-6
    with backend("reference"):
        _, tangent = torch.func.jvp(both(None), tuple(args), tuple(tangents))
        ahead, behind = (
            both(None)(*(a + s * d for a, d in zip(args, tangents, strict=True)))
            for s in (step, -step)
        )
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("argument", range(5))
def test_forward_mode_ad_is_refused(name, argument):
    args = inputs(None, 3, 4)

    def run(value):
        return both(None)(*args[:argument], value, *args[argument + 1 :])

    tangent = torch.ones_like(args[argument])
    with backend(name), pytest.raises(RuntimeError, match="forward-mode AD"):
        torch.func.jvp(run, (args[argument],), (tangent,))


class TestFP8:
    @pytest.mark.parametrize("name", ["reference", *kernel_backends()])
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    @pytest.mark.parametrize("kind", LAYOUTS)
    @pytest.mark.parametrize(
        ("lengths", "dim"), list(zip(LENGTHS * 2, DIMS + DIMS[:2], strict=True))
    )
    def test_is_the_norm_quantised_before_it_is_rounded(self, name, dtype, kind, lengths, dim):
        rows, frames = layout(kind, lengths)
        args = inputs(rows, frames, dim, dtype)
        *_, shift, scale = args
        with backend(name), poisoned_memory():
            x_out, y = gated_residual_norm_fp8(*args, rows)
            first = modulated_layer_norm_fp8(x_out, shift, scale, rows)
            expected, _ = gated_residual_norm(*args, rows)
        assert torch.equal(x_out, expected)
        assert_nothing_else(y.q.float(), rows)
        exact = modulated_layer_norm(x_out.double(), shift.double(), scale.double(), rows)
        for got in (y, first):
            assert got.q.dtype == FP8
            assert got.scale.isfinite().all()
            largest = exact.abs().amax(1, keepdim=True).float()
            torch.testing.assert_close(
                got.scale, (largest / 448).clamp(min=2.0**-126), rtol=1e-4, atol=0
            )
            step = (exact.abs() / 16).maximum(got.scale.double() * 2**-10)
            error = (got.q.double() * got.scale.double() - exact).abs()
            assert (error <= step * (1 + 1e-3) + 1e-5 * exact.abs().amax(1, keepdim=True)).all()

    @pytest.mark.parametrize("name", ["reference", *kernel_backends()])
    def test_a_batch_equals_its_rows(self, name):
        rows, frames = layout("packed", [17, 1, 40])
        x, h, *modulations = inputs(rows, frames, 48)
        with backend(name):
            x_out, y = gated_residual_norm_fp8(x, h, *modulations, rows)
            batch = zip(*(rows_of(t, rows) for t in (x_out, y.q.float(), y.scale)), strict=True)
            pieces = zip(rows_of(x, rows), rows_of(h, rows), strict=True)
            for i, (together, (x_i, h_i)) in enumerate(zip(batch, pieces, strict=True)):
                own = [m[i : i + 1] for m in modulations]
                x_alone, y_alone = gated_residual_norm_fp8(x_i, h_i, *own)
                alone = (x_alone, y_alone.q.float(), y_alone.scale)
                assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))

    @pytest.mark.parametrize("name", ["reference", *kernel_backends()])
    def test_empty(self, name):
        rows, frames = layout("packed", [], spare=0)
        with backend(name):
            x_out, y = gated_residual_norm_fp8(*inputs(rows, frames, 16), rows)
        assert (x_out.shape, y.q.shape, y.scale.shape) == ((0, 16), (0, 16), (0, 1))

    @pytest.mark.parametrize("name", kernel_backends())
    def test_opcheck(self, name):
        rows, frames = layout("packed", [5, 3], spare=0)
        x, h, gate, shift, scale = inputs(rows, frames, 16)
        with backend(name):
            torch.library.opcheck(_op_fp8, (x, h, gate, shift, scale, *rows, 1e-6))
            nothing = (None, None, None, 0)
            torch.library.opcheck(_op_fp8, (x, None, None, shift[:1], scale[:1], *nothing, 1e-6))

    @pytest.mark.parametrize("name", ["reference", *kernel_backends()])
    def test_compiles_without_graph_breaks_or_recompiles(self, name):
        def run(x, h, gate, shift, scale, lengths):
            rows = Rows.padded(lengths, len(x) // 2)
            x, y = gated_residual_norm_fp8(x, h, gate, shift, scale, rows)
            return torch.stack([x, y.float()])

        def call(frames):
            rows, total = layout("padded", [frames, frames - 2], spare=0)
            x, h, *modulation = inputs(rows, total, 16)
            return torch.nan_to_num(x), torch.nan_to_num(h), *modulation, rows.lengths.long()

        with backend(name):
            assert_compiles_once(run, *(call(frames) for frames in (7, 12, 33)))

    @pytest.mark.parametrize("argument", ["x", "h", "gate", "shift", "scale"])
    def test_gradients_are_refused(self, argument):
        names = ("x", "h", "gate", "shift", "scale")
        args = dict(zip(names, inputs(None, 3, 16), strict=True))
        args[argument].requires_grad_()
        with pytest.raises(ValueError, match=f"^{argument}: expected a tensor without gradient"):
            gated_residual_norm_fp8(**args)
