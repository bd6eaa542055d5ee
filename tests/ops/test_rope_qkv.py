import pytest
import torch

from imf_kernels.models.positions import RotaryEmbedding
from imf_kernels.ops import rope_qkv
from imf_kernels.ops.rope_qkv import _op, _op_backward, _op_in_place
from imf_kernels.rows import Rows
from tests.ops.layouts import LAYOUTS, layout, rows_of
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
HEADS, WIDTH = 3, 16


def table(frames: int, width: int = WIDTH) -> torch.Tensor:
    return RotaryEmbedding(width).to(DEVICE)(frames)


def inputs(rows: Rows, frames: int, dtype=torch.float32, norm=False):
    qkv = torch.randn(frames, 3, HEADS, WIDTH, device=DEVICE).to(dtype)
    weights = (1 + 0.3 * torch.randn(2, WIDTH, device=DEVICE)).to(dtype).unbind() if norm else ()
    return [qkv, *weights]


def run(rows, rope, heads, **options):
    def op(qkv, q_weight=None, k_weight=None):
        return rope_qkv(qkv, rope, rows, heads, q_weight=q_weight, k_weight=k_weight, **options)

    return op


def complex_form(rope, heads):
    """One row, its pairs as complex numbers."""
    cos, sin = rope.chunk(2, dim=-1)

    def op(qkv, *weights):
        turn = torch.complex(cos, sin).to(
            torch.complex128 if qkv.dtype == torch.float64 else torch.complex64
        )
        parts = list(qkv.unbind(1))
        for i, weight in enumerate(weights):
            parts[i] = torch.nn.functional.rms_norm(parts[i], (WIDTH,), weight, 1e-6)
        for i in range(2):
            x = parts[i][:, :heads].to(torch.promote_types(qkv.dtype, torch.float32))
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            turned = torch.view_as_real(pairs * turn[: len(qkv), None]).flatten(-2)
            parts[i] = torch.cat([turned.to(qkv.dtype), parts[i][:, heads:]], dim=1)
        return torch.stack(parts, dim=1)

    return op


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("heads", [1, 2, HEADS])
@pytest.mark.parametrize("norm", [False, True])
def test_outputs_and_gradients_follow_the_error_rule(name, dtype, kind, heads, norm):
    rows, frames = layout(kind, [1, 17, 40])
    args, grad = inputs(rows, frames, dtype, norm), torch.randn(frames, 3, HEADS, WIDTH)
    rope, grad = table(rows.longest), grad.to(DEVICE, dtype)
    with backend(name), poisoned_memory():
        ours = with_gradients(run(rows, rope, heads), args, grad)
    outside = rows.row_of < 0
    assert torch.equal(ours[0][outside], args[0][outside]), "frames of no row stay as they are"
    spans = [rows_of(x, rows) for x in (args[0], grad, *ours[:2])]
    plain, weights, sums = complex_form(rope, heads), args[1:], [0.0] * len(args[1:])
    for one, grad_one, *got in zip(*spans, strict=True):
        wide = [one.double(), *(w.double() for w in weights)]
        exact = with_gradients(plain, wide, grad_one.double())
        same_dtype = with_gradients(plain, [one, *weights], grad_one)
        for mine, allowed, true in zip(got, same_dtype, exact, strict=False):
            assert mine.dtype == dtype
            assert_error_rule(mine, allowed, true, atol=1e-6 * float(true.abs().max()))
        sums = [total + part for total, part in zip(sums, exact[2:], strict=True)]
    for mine, true in zip(ours[2:], sums, strict=True):
        scale = float(true.abs().max())
        torch.testing.assert_close(
            mine.double(), true, rtol=0, atol=scale * 2 * torch.finfo(dtype).eps + 1e-5
        )


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
@pytest.mark.parametrize("norm", [False, True])
def test_in_place_is_the_same(name, norm):
    rows, frames = layout("packed", [5, 12])
    qkv, *weights = inputs(rows, frames, norm=norm)
    with backend(name):
        want = run(rows, table(12), 2)(qkv.clone(), *weights)
        got = run(rows, table(12), 2, in_place=True)(qkv, *weights)
    assert torch.equal(got, want)
    assert name == "reference" or got is qkv


def test_in_place_refuses_gradients():
    rows, frames = layout("packed", [5])
    qkv = inputs(rows, frames)[0].requires_grad_()
    with pytest.raises(ValueError, match="in_place: expected a qkv without gradient"):
        rope_qkv(qkv, table(5), rows, in_place=True)


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_scores_depend_on_distances_only(name):
    """The point of RoPE: q_i . k_j is a function of i - j."""
    rows, frames = layout("packed", [30], spare=0)
    qkv = torch.randn(1, 3, 1, WIDTH, device=DEVICE).expand(frames, -1, -1, -1)
    with backend(name):
        q, k, _ = rope_qkv(qkv, table(30), rows).unbind(1)
    scores = q[:, 0] @ k[:, 0].T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_strided_views(name):
    rows, frames = layout("padded", [9, 12], spare=0)
    wide = torch.randn(frames, 5, 2 * HEADS, 2 * WIDTH, device=DEVICE)
    for view in (wide[:, 1:4, :HEADS, :WIDTH], wide[:, :3, ::2, ::2]):
        with backend(name):
            got = rope_qkv(view, table(12), rows)
            want = rope_qkv(view.contiguous(), table(12), rows)
            inside = rope_qkv(view.clone(), table(12), rows, in_place=True)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(inside, want)


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_empty(name):
    rows, frames = layout("packed", [], spare=0)
    args = inputs(rows, frames, norm=True)
    with backend(name):
        _, *grads = with_gradients(run(rows, table(1), None), args, torch.zeros_like(args[0]))
    assert all(float(grad.abs().sum()) == 0 for grad in grads)


@pytest.mark.parametrize("name", ["reference", *kernel_backends()])
@pytest.mark.parametrize("norm", [False, True])
def test_gradcheck(name, norm):
    rows, frames = layout("packed", [2, 1])
    args = [a.double().requires_grad_() for a in inputs(rows, frames, norm=norm)]
    with backend(name):
        fast = name != "reference"  # the interpreter is slow
        assert torch.autograd.gradcheck(run(rows, table(2).double(), 2), args, fast_mode=fast)


@pytest.mark.parametrize("name", BACKENDS)
def test_opcheck(name):
    rows, frames = layout("packed", [5, 3])
    qkv, *weights = inputs(rows, frames, norm=True)
    rope = table(5)
    with backend(name):
        leaf = qkv.clone().requires_grad_()
        torch.library.opcheck(_op, (leaf, rope, *rows, 2, None, None, 1e-6))
        torch.library.opcheck(_op, (leaf, rope, *rows, 2, *weights, 1e-6))
        torch.library.opcheck(_op_in_place, (qkv.clone(), rope, *rows, 2, None, None, 1e-6))
        arguments = (qkv, qkv, rope, rows.starts, rows.row_of, 2, *weights, 1e-6)
        torch.library.opcheck(_op_backward, arguments)


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
@pytest.mark.parametrize("in_place", [False, True])
def test_compiles_without_graph_breaks_or_recompiles(name, in_place):
    def op(qkv, rope, lengths):
        rows = Rows.padded(lengths, len(qkv) // 2)
        return rope_qkv(qkv * 1, rope, rows, 2, in_place=in_place)

    calls = []
    for length in (7, 12, 33):
        rows, frames = layout("padded", [length, length - 2], spare=0)
        calls.append((inputs(rows, frames)[0], table(length), rows.lengths.long()))
    with backend(name):
        assert_compiles_once(op, *calls)


@pytest.mark.parametrize("name", BACKENDS)
def test_forward_mode_ad_is_refused(name):
    rows, frames = layout("packed", [3])
    qkv, *_ = inputs(rows, frames)
    with backend(name), pytest.raises(RuntimeError, match="forward-mode AD"):
        torch.func.jvp(run(rows, table(3), 1), (qkv,), (qkv,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 9}, "heads: expected 0 to 3, got 9"),
        ({"rope": torch.zeros(8, 4)}, "rope: expected shape"),
        ({"rope": torch.zeros(8, WIDTH).half()}, "rope: expected torch.float32"),
        ({"q_weight": torch.ones(WIDTH)}, "k_weight: expected both"),
    ],
)
def test_bad_input_is_named(change, message):
    rows = Rows.padded(torch.tensor([8]), 8)
    given = {"qkv": torch.zeros(8, 3, 3, WIDTH), "rope": torch.zeros(8, WIDTH), "rows": rows}
    with pytest.raises((TypeError, ValueError), match=message):
        rope_qkv(**given | change)
