"""Other libraries' attention: what is asked of them, and who is refused. None of them runs here."""

import importlib.util
import inspect
import sys
import types

import pytest
import torch

from imf_kernels import backends, dispatch
from imf_kernels.ops import _flash, attention
from imf_kernels.ops._flash import LIBRARIES, Library, choose
from imf_kernels.ops.attention import _op
from imf_kernels.rows import Rows
from tests.ops.layouts import LAYOUTS, assert_nothing_else, layout, rows_of
from tests.ops.tools import DEVICE, backend, with_gradients

CUDA = torch.device("cuda", 0)
interpreted = pytest.mark.skipif(
    not (dispatch.INTERPRETED or torch.cuda.is_available()), reason="needs Triton"
)


def plain(q, k, v, starts, lengths, scale):
    """Each row on its own, natural logarithms, NaN where no row is."""
    out, sums = torch.full_like(q, torch.nan), torch.full(q.shape[1::-1], torch.nan)
    for start, length in zip(starts[:-1].tolist(), lengths.tolist(), strict=True):
        own = slice(start, start + length)
        one, two, three = (x[own].float().transpose(0, 1) for x in (q, k, v))
        scores = scale * one @ two.mT
        out[own] = (scores.softmax(-1) @ three).transpose(0, 1).to(q.dtype)
        sums[:, own] = scores.logsumexp(-1)
    return out, sums.to(q.device)


def honest(q, k, v, rows, scale):
    return plain(q, k, v, rows.starts, rows.lengths, scale)


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setitem(LIBRARIES, "honest", Library(lambda: honest, ()))
    yield
    _flash._loaded.cache_clear()


@interpreted
@pytest.mark.parametrize("kind", LAYOUTS)
def test_their_forward_and_our_backward(library, kind):
    rows, frames = layout(kind, [17, 1, 40])
    qkv = torch.randn(frames, 3, 2, 32, device=DEVICE)
    grad = torch.randn(frames, 2, 32, device=DEVICE)
    grad[rows.row_of < 0] = torch.nan
    with backend("triton"):
        got = with_gradients(lambda x: _op(x, *rows, None, 32**-0.5, "honest")[0], [qkv], grad)
        expected = with_gradients(lambda x: attention(x, rows), [qkv], grad)
    for mine, want in zip(got, expected, strict=True):
        assert_nothing_else(mine, rows)
        for a, b in zip(rows_of(mine, rows), rows_of(want, rows), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda out, sums, rows: (out, sums), ""),
        (lambda out, sums, rows: (out * 1.1, sums), "its results are not ours"),
        (lambda out, sums, rows: (out * torch.nan, sums), "its results are not ours"),
        (lambda out, sums, rows: (out, sums / 2), "its logarithms of sums are not ours"),
        (
            lambda out, sums, rows: (out + 2e-3 * len(rows.lengths), sums),
            "a row depends on its batch",
        ),
    ],
)
def test_the_probe_finds_what_is_wrong(spoil, fault):
    def run(q, k, v, rows, scale):
        return spoil(*honest(q, k, v, rows, scale), rows)

    assert _flash._fault(run, torch.device(DEVICE), torch.bfloat16, 32) == fault


@pytest.fixture
def card(monkeypatch):
    """A CUDA device that is said to be there, of a compute capability."""

    def of(major, installed, choice="auto", faults=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
        monkeypatch.setattr(_flash, "CHOICE", choice)
        monkeypatch.setattr(_flash, "_chosen", {})

        def loaded(name):
            if name not in installed:
                raise ImportError(name)
            return name

        monkeypatch.setattr(_flash, "_loaded", loaded)
        monkeypatch.setattr(_flash, "_fault", lambda run, *_: (faults or {}).get(run, ""))

    return of


def test_the_first_that_is_installed_fast_and_right(card):
    every = set(LIBRARIES)
    for major, installed, want in (
        (9, every, "flash-attn-3"),
        (10, every, "flash-attn-4"),
        (8, every, "flash-attn-2"),
        (8, {"torch"}, "torch"),
        (9, {"flash-attn-2", "torch"}, ""),
        (9, set(), ""),
        (7, every, ""),
    ):
        card(major, installed)
        assert choose(CUDA, torch.bfloat16, 64) == want
    card(9, every)
    assert choose(CUDA, torch.float32, 64) == ""
    assert choose(torch.device("cpu"), torch.bfloat16, 64) == ""
    with backend("reference"):
        assert choose(CUDA, torch.bfloat16, 64) == ""
    card(9, every, choice="ours")
    assert choose(CUDA, torch.bfloat16, 64) == ""
    card(9, every, choice="torch")
    assert choose(CUDA, torch.float16, 128) == "torch"


def test_who_fails_the_probe_is_not_used(card):
    card(8, {"flash-attn-2", "torch"}, faults={"flash-attn-2": "its results are not ours"})
    with pytest.warns(RuntimeWarning, match="without the attention of 'flash-attn-2'"):
        assert choose(CUDA, torch.bfloat16, 64) == "torch"
    card(8, {"torch"}, choice="torch", faults={"torch": "a row depends on its batch"})
    with pytest.raises(RuntimeError, match="'torch' fails on cuda:0: a row depends"):
        choose(CUDA, torch.bfloat16, 64)
    card(8, set(), choice="flash-attn-3")
    with pytest.raises(RuntimeError, match="'flash-attn-3' is not installed"):
        choose(CUDA, torch.bfloat16, 64)


def test_nothing_is_decided_during_a_capture(card, monkeypatch):
    card(9, {"flash-attn-3"})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(CUDA, torch.bfloat16, 64) == ""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose(CUDA, torch.bfloat16, 64) == "flash-attn-3"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(CUDA, torch.bfloat16, 64) == "flash-attn-3"


# -- how each is called, by its published signature -----------------------------------------------


def fa4(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    seqused_q=None, seqused_k=None, page_table=None, softmax_scale=None, causal=False,
    num_splits=1, return_lse=False,
):  # fmt: skip
    assert return_lse
    assert (max_seqlen_q, max_seqlen_k, num_splits, causal) == (20, 20, 1, False)
    assert torch.equal(seqused_q, seqused_k)
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    return plain(q, k, v, cu_seqlens_q, seqused_k, softmax_scale)


def fa3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
    seqused_k=None, softmax_scale=None, causal=False, qv=None, num_splits=1,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert return_attn_probs
    assert (max_seqlen_q, max_seqlen_k, num_splits, causal) == (20, 20, 1, False)
    assert torch.equal(seqused_q, seqused_k)
    return plain(q, k, v, cu_seqlens_q, seqused_k, softmax_scale)


def early_fa3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
    seqused_k=None, softmax_scale=None, causal=False, num_splits=1,
):  # fmt: skip
    return plain(q, k, v, cu_seqlens_q, seqused_k, softmax_scale)


def fa2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
    causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
    return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
):  # fmt: skip
    assert (max_seqlen_q, max_seqlen_k, dropout_p, causal) == (20, 20, 0.0, False)
    return (*plain(q, k, v, cu_seqlens_q, seqused_k, softmax_scale), None, None)


CALLS = [
    ("flash-attn-4", "flash_attn.cute", "flash_attn_varlen_func", fa4),
    ("flash-attn-3", "flash_attn_interface", "flash_attn_varlen_func", fa3),
    ("flash-attn-3", "flash_attn_interface", "flash_attn_varlen_func", early_fa3),
    ("flash-attn-2", "flash_attn.flash_attn_interface", "_flash_attn_varlen_forward", fa2),
]


@pytest.mark.parametrize(("name", "module", "function", "stand_in"), CALLS)
def test_each_library_is_called_as_it_is_published(name, module, function, stand_in, monkeypatch):
    fake = types.ModuleType(module)
    setattr(fake, function, stand_in)
    monkeypatch.setitem(sys.modules, module.split(".")[0], types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, module, fake)
    rows, frames = Rows.padded(torch.tensor([7, 20], device=DEVICE), 20), 40
    q, k, v = torch.randn(3, frames, 2, 16, device=DEVICE)
    got = LIBRARIES[name].load()(q, k, v, rows, 0.25)
    for mine, want in zip(got, honest(q, k, v, rows, 0.25), strict=True):
        assert torch.equal(mine.nan_to_num(), want.nan_to_num())


def test_pytorchs_own_is_called_as_it_is_published(monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    signature = inspect.signature(varlen.varlen_attn)

    def stand_in(*args, **options):
        given = signature.bind(*args, **options).arguments
        assert (given["max_q"], given["max_k"], given["num_splits"]) == (20, 20, 1)
        assert given["return_aux"].lse
        q, k, v = (given[name] for name in ("query", "key", "value"))
        return plain(q, k, v, given["cu_seq_q"], given["seqused_k"], given["scale"])

    stand_in.__signature__ = signature
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    rows, frames = Rows.padded(torch.tensor([7, 20], device=DEVICE), 20), 40
    q, k, v = torch.randn(3, frames, 2, 16, device=DEVICE)
    if "num_splits" not in signature.parameters:
        with pytest.raises(ImportError, match=r"2\.12"):
            LIBRARIES["torch"].load()
        return
    got = LIBRARIES["torch"].load()(q, k, v, rows, 0.25)
    for mine, want in zip(got, honest(q, k, v, rows, 0.25), strict=True):
        assert torch.equal(mine.nan_to_num(), want.nan_to_num())


def test_what_is_not_installed_is_an_import_error():
    for name, module in (("flash-attn-3", "flash_attn_interface"), ("flash-attn-2", "flash_attn")):
        if importlib.util.find_spec(module) is None:
            with pytest.raises(ImportError):
                LIBRARIES[name].load()


def test_the_chosen_path_is_visible(card):
    with backend("reference"):
        assert backends()["attention"] == "reference"
    if not torch.cuda.is_available():
        assert backends()["attention"] in ("cpp", "sdpa")


@pytest.mark.gpu
def test_the_chosen_path_on_the_device():
    assert backends()["attention"] in ("triton", *LIBRARIES)
    for name in LIBRARIES:
        try:
            run = LIBRARIES[name].load()
        except ImportError:
            continue
        if torch.cuda.get_device_capability()[0] in LIBRARIES[name].generations:
            assert _flash._fault(run, torch.device("cuda", 0), torch.bfloat16, 64) == ""
