"""Flash attention of other libraries: taken where it is installed, fast on the device, and right.

They serve bfloat16 and float16 without a chunk; everything else is ours. A library is asked once
per device, dtype and head width to repeat what our kernel says of odd rows with gaps between them,
each row bit for bit as it is alone: whichever fails is not used. Nothing here reads the device
afterwards: `starts` is their `cu_seqlens`, `lengths` their `seqused`, `longest` their maximum.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imf_kernels import checks, dispatch
from imf_kernels.ops import _attention_kernels as ours
from imf_kernels.rows import Rows

Forward = Callable[[Tensor, Tensor, Tensor, Rows, float], tuple[Tensor, Tensor]]
"""`q, k, v` `(T, H, head_dim)` to the same and natural logarithms of softmax sums `(H, T)`; what
they hold where no row is means nothing."""


def _flash_attn_4() -> Forward:
    run: Any = importlib.import_module("flash_attn.cute").flash_attn_varlen_func
    return functools.partial(_with_seqused, run, _asking_for("return_lse", run))


def _flash_attn_3() -> Forward:
    run: Any = importlib.import_module("flash_attn_interface").flash_attn_varlen_func
    return functools.partial(_with_seqused, run, _asking_for("return_attn_probs", run))


def _asking_for(option: str, run: Any) -> dict[str, bool]:
    """Earlier versions return the sums unasked."""
    return {option: True} if option in inspect.signature(run).parameters else {}


def _with_seqused(
    run: Any, options: dict[str, bool], q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float
) -> tuple[Tensor, Tensor]:
    used = {"seqused_q": rows.lengths, "seqused_k": rows.lengths}
    bounds = (rows.starts, rows.starts, rows.longest, rows.longest)
    out, sums, *_ = run(q, k, v, *bounds, **used, softmax_scale=scale, num_splits=1, **options)
    return out, sums


def _flash_attn_2() -> Forward:
    run: Any = importlib.import_module("flash_attn.flash_attn_interface")._flash_attn_varlen_forward

    def forward(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float) -> tuple[Tensor, Tensor]:
        bounds = (rows.starts, rows.starts, rows.longest, rows.longest)
        options = {"dropout_p": 0.0, "softmax_scale": scale, "causal": False}
        out, sums, *_ = run(q, k, v, *bounds, **options, seqused_k=rows.lengths)
        return out, sums

    return forward


def _torch() -> Forward:
    varlen: Any = importlib.import_module("torch.nn.attention.varlen")
    if "num_splits" not in inspect.signature(varlen.varlen_attn).parameters:
        raise ImportError("PyTorch before 2.12 cannot be told to keep a row apart from its batch")

    def forward(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float) -> tuple[Tensor, Tensor]:
        bounds = (rows.starts, rows.starts, rows.longest, rows.longest)
        options = {"seqused_k": rows.lengths, "scale": scale, "num_splits": 1}
        return varlen.varlen_attn(
            q, k, v, *bounds, return_aux=varlen.AuxRequest(lse=True), **options
        )

    return forward


class Library(NamedTuple):
    """`load` raises ImportError where it is not installed; `generations` are the major compute
    capabilities where its published speed is above a Triton kernel's."""

    load: Callable[[], Forward]
    generations: tuple[int, ...]


LIBRARIES = {
    "flash-attn-4": Library(_flash_attn_4, (10,)),
    "flash-attn-3": Library(_flash_attn_3, (9,)),
    "flash-attn-2": Library(_flash_attn_2, (8,)),
    "torch": Library(_torch, (8,)),
}
"""The faster first."""

CHOICE = os.environ.get("IMF_KERNELS_ATTENTION", "auto")
"""A library, "ours", or "auto": the first that is installed, fast on the device, and right."""
checks.choice("IMF_KERNELS_ATTENTION", CHOICE, ("auto", "ours", *LIBRARIES))

OURS = ""
_chosen: dict[tuple[torch.device, torch.dtype, int], str] = {}


def choose(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """The library for full attention of this kind, or `OURS`. Never decided during a capture.

    Raises:
        RuntimeError: `IMF_KERNELS_ATTENTION` names a library that is not there, or fails.
    """
    if CHOICE == "ours" or dispatch.forced() != "auto" or not torch.cuda.is_available():
        return OURS
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return OURS
    key = (device, dtype, width)
    if key not in _chosen:
        if not dispatch.may_probe():
            return OURS
        with dispatch.probing():
            _chosen[key] = _first_right(*key)
    return _chosen[key]


dispatch.constant_to_dynamo(choose)


def _first_right(device: torch.device, dtype: torch.dtype, width: int) -> str:
    generation = torch.cuda.get_device_capability(device)[0]
    for name, library in LIBRARIES.items():
        if name != CHOICE and (CHOICE != "auto" or generation not in library.generations):
            continue
        try:
            fault = _fault(_loaded(name), device, dtype, width)
        except ImportError as error:
            if name == CHOICE:
                raise RuntimeError(f"IMF_KERNELS_ATTENTION: {name!r} is not installed") from error
            continue
        except Exception as error:  # whatever a library raises on a device that it does not know
            fault = f"{type(error).__name__}: {error}"
        if not fault:
            return name
        if name == CHOICE:
            raise RuntimeError(f"IMF_KERNELS_ATTENTION: {name!r} fails on {device}: {fault}")
        warnings.warn(
            f"imf_kernels does without the attention of {name!r} on {device}: {fault}",
            RuntimeWarning,
            stacklevel=2,
        )
    return OURS


@functools.cache
def _loaded(name: str) -> Forward:
    return LIBRARIES[name].load()


@torch.no_grad()
def _fault(run: Forward, device: torch.device, dtype: torch.dtype, width: int) -> str:
    """What is wrong with a library's answers; empty if nothing is."""
    lengths = torch.tensor([200, 1, 0, 77, 130], device=device)
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(5 * 210, 3, 16, width, device=device, generator=generator).to(dtype)
    for rows in (Rows.padded(lengths, 210), Rows.packed(lengths, 5 * 210, 210)):
        fault = _fault_over(rows, run, qkv)
        if fault:
            return fault
    return ""


def _fault_over(rows: Rows, run: Forward, qkv: Tensor) -> str:
    dtype, width = qkv.dtype, qkv.shape[3]
    scale = width**-0.5
    q, k, v = qkv.unbind(1)
    got, sums = run(q, k, v, rows, scale)
    want, base2 = ours.forward(q, qkv[:, 1:], rows, rows.starts, rows.lengths, None, scale)
    valid = rows.row_of >= 0
    allowed = 4 * torch.finfo(dtype).eps
    if not bool((got - want)[valid].abs().max() <= allowed):
        return "its results are not ours"
    if not bool((sums * ours.LOG2_E - base2)[:, valid].abs().max() <= 1e-2):
        return "its logarithms of sums are not ours"
    for start, length in zip(rows.starts[:-1].tolist(), rows.lengths.tolist(), strict=True):
        own = slice(start, start + length)
        if length:
            apart = Rows.padded(rows.lengths.new_tensor([length]), length)
            alone, _ = run(q[own], k[own], v[own], apart, scale)
            if not torch.equal(alone, got[own]):
                return "a row depends on its batch"
    return ""


def forward(name: str, qkv: Tensor, rows: Rows, scale: float) -> tuple[Tensor, Tensor]:
    """As our kernel's: 0 where no row is, but logarithms to base e."""
    q, k, v = qkv.unbind(1)
    out, sums = _loaded(name)(q, k, v, rows, scale)
    ours.clear(out, rows)
    return out, sums
