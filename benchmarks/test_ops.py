"""Every fused op against plain PyTorch, that under torch.compile, and the device's limits.

    ours            the fused kernel
    plain           the op in plain PyTorch at the same dtype, eager
    torch.compile   the same, compiled (Inductor), shapes fixed

A call is timed within a CUDA graph of many calls, each on inputs of its own: together they exceed
the L2 cache several times, so that every call finds it cold. "backward" is forward and backward,
all forwards before the first backward. Bytes are what the computation has to move: inputs that it
needs once, results once. An error is that of the worst result or gradient against float64, relative
RMS; ours may have twice that of plain PyTorch.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.contest import Conditions, Contest, Row, Unavailable
from benchmarks.plain import plainly
from benchmarks.timing import Ceilings, Run, graphed, l2_bytes
from benchmarks.workload import allowed, error, limit, worst
from imf_kernels import ops
from imf_kernels.rows import Rows

KINDS = ("frames", "mels", "qkv")
"""What most of an op's bytes are."""
SIZES = {
    "large": {"frames": (8, 4096), "mels": (128, 2688), "qkv": (8, 1408)},  # 64 MiB and more
    "speech": dict.fromkeys(KINDS, (1, 1250)),  # 10 s generated after a 3.3 s prompt
    "speech8": dict.fromkeys(KINDS, (8, 1250)),
    "short": dict.fromkeys(KINDS, (1, 469)),  # 5 s
    "tiny": dict.fromkeys(KINDS, (2, 17)),
}
"""Rows and frames."""
Inputs = dict[str, Any]


class Size(NamedTuple):
    rows: int
    frames: int
    dtype: torch.dtype
    dim: int = 1024
    heads: int = 16
    channels: int = 100

    def layout(self) -> Rows:
        """All rows full: every frame is a byte count's frame."""
        return Rows.padded(torch.full((self.rows,), self.frames), self.frames)

    def hidden(self, *sizes: int) -> Tensor:
        return torch.randn(self.rows * self.frames, *(sizes or (self.dim,)), dtype=self.dtype)

    def mels(self, branches: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(branches * self.rows, self.frames, self.channels, dtype=dtype)

    def modulation(self) -> tuple[Tensor, ...]:
        """Six vectors a row, views of one tensor as a model has them."""
        return torch.randn(self.rows, 6, self.dim, dtype=self.dtype).unbind(1)


def euler_step(size: Size) -> Inputs:
    return {
        "x": size.mels(),
        "velocity": size.mels(2, size.dtype),
        "dt": torch.rand(size.rows),
        "guidance": 3.0,
        "lengths": torch.full((size.rows,), size.frames),
        "displacement": size.mels(),
        "model_dtype": size.dtype,
    }


def velocity_loss(size: Size) -> Inputs:
    return {
        "prediction": size.mels(dtype=size.dtype),
        "displacement": size.mels(),
        "t": torch.full((size.rows,), 0.25),
        "r": torch.full((size.rows,), 0.75),
        "mask": torch.ones(size.rows, size.frames, dtype=torch.bool),
    }


def norm(size: Size) -> Inputs:
    shift, scale, *_ = size.modulation()
    return {"x": size.hidden(), "shift": shift, "scale": scale, "rows": size.layout()}


def residual_norm(size: Size) -> Inputs:
    _, _, gate, shift, scale, _ = size.modulation()
    modulation = {"gate": gate, "shift": shift, "scale": scale}
    return {"x": size.hidden(), "h": size.hidden(), **modulation, "rows": size.layout()}


def plain_residual_norm(size: Size) -> Inputs:
    weight, bias = torch.randn(2, size.dim, dtype=size.dtype).unbind()
    return {"x": size.hidden(), "h": size.hidden(), "weight": weight, "bias": bias}


def unet_block(size: Size) -> Inputs:
    """CosyVoice2's width, whatever the others have."""
    weight = torch.randn(256, 256, 3, dtype=size.dtype) / (3 * 256) ** 0.5
    bias, gamma, beta = torch.randn(3, 256, dtype=size.dtype).unbind()
    return {
        "x": size.hidden(256),
        "weight": weight,
        "bias": bias,
        "gamma": gamma,
        "beta": beta,
        "rows": size.layout(),
        "shift": torch.randn(size.rows, 256),
    }


def rope(size: Size) -> Inputs:
    width = size.dim // size.heads
    angles = torch.outer(torch.arange(size.frames), 1e4 ** -torch.linspace(0, 1, width // 2))
    return {
        "qkv": size.hidden(3, size.heads, width),
        "rope": torch.cat([angles.cos(), angles.sin()], dim=-1),
        "rows": size.layout(),
    }


def position_conv(size: Size) -> Inputs:
    """Groups of 64 channels and 31 taps, the second of the two convolutions."""
    weight = torch.randn(size.dim, 64, 31, dtype=size.dtype) / (64 * 31) ** 0.5
    return {
        "x": size.hidden(),
        "weight": weight.mT.contiguous().mT,  # as a model lays it out
        "bias": torch.zeros(size.dim, dtype=size.dtype),
        "rows": size.layout(),
        "residual": size.hidden(),
    }


def convnext_head(size: Size) -> Inputs:
    """F5-TTS's text width, whatever the blocks have."""
    return {
        "x": size.hidden(512),
        "weight": torch.randn(512, 1, 7, dtype=size.dtype) / 7**0.5,
        **dict(zip(("bias", "gamma", "beta"), torch.randn(3, 512, dtype=size.dtype), strict=True)),
        "rows": size.layout(),
    }


def convnext_response(size: Size) -> Inputs:
    gamma, beta = torch.randn(2, 1024, dtype=size.dtype).unbind()
    return {"h": size.hidden(1024), "gamma": gamma, "beta": beta, "rows": size.layout()}


def packed_qkv(size: Size) -> Inputs:
    qkv = size.hidden(3, size.heads, size.dim // size.heads)
    return {"qkv": qkv, "rows": size.layout(), "finite": True}


def streaming_qkv(size: Size) -> Inputs:
    """Blocks of 50 frames, each seeing those before it."""
    return packed_qkv(size) | {"chunk": torch.full((size.rows,), 50)}


def cached_qkv(size: Size) -> Inputs:
    """A block of 50 new frames of each row, which a cache holds all of."""
    heads = size.heads, size.dim // size.heads
    new, held = min(50, size.frames), torch.full((size.rows,), size.frames, dtype=torch.int32)
    return {
        "q": torch.randn(size.rows * new, *heads, dtype=size.dtype),
        "kv": size.hidden(2, *heads),
        "rows": Rows.padded(torch.full((size.rows,), new), new),
        "kv_starts": torch.arange(size.rows, dtype=torch.int32) * size.frames,
        "kv_lengths": held,
    }


def requests(size: Size) -> Inputs:
    """What a request copies into a bucket that is 6 % longer."""
    bucket = size.frames + -(-size.frames // 16)
    conditions = size.hidden().unflatten(0, (size.rows, size.frames))
    return {
        "copies": [
            ops.Copy(source.new_empty(size.rows, bucket, source.shape[2]), source)
            for source in (conditions, size.mels())
        ]
    }


def copied(copies: list[ops.Copy]) -> list[Tensor]:
    ops.ragged_copy(copies)
    return [copy.destination for copy in copies]


def plain_attention(
    qkv: Tensor, rows: Rows, chunk: Tensor | None = None, finite: bool = True
) -> Tensor:
    """Of full rows, in blocks of 50 frames if any; PyTorch's own kernel, whichever it takes."""
    heads = qkv.unflatten(0, (-1, rows.longest)).transpose(1, 3).unbind(2)
    mask = None
    if chunk is not None:
        block = torch.arange(rows.longest, device=qkv.device) // 50
        mask = block[None, :] <= block[:, None]
    return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(0, 1)


def plain_cached_attention(
    q: Tensor, kv: Tensor, rows: Rows, kv_starts: Tensor, kv_lengths: Tensor
) -> Tensor:
    """Of rows behind one another, all of a length and a block."""
    queries = q.unflatten(0, (-1, rows.longest)).transpose(1, 2)
    k, v = kv.unflatten(0, (len(kv_starts), -1)).transpose(1, 3).unbind(2)
    return F.scaled_dot_product_attention(queries, k, v).transpose(1, 2).flatten(0, 1)


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor, rows: Rows, residual: Tensor) -> Tensor:
    """Of full rows, in the dtype of `x`."""
    rowwise = x.unflatten(0, (-1, rows.longest)).transpose(1, 2)
    groups = x.shape[1] // weight.shape[1]
    z = F.conv1d(rowwise, weight, bias, padding=weight.shape[2] // 2, groups=groups)
    return F.mish(z).transpose(1, 2).flatten(0, 1) + residual


def plain_rotation(qkv: Tensor, rope: Tensor, rows: Rows) -> Tensor:
    """Of full rows, q and k rewritten in place."""
    cos, sin = rope[: rows.longest, None, None].chunk(2, dim=-1)
    pairs = qkv.unflatten(0, (-1, rows.longest))[:, :, :2].unflatten(-1, (-1, 2))
    even, odd = pairs.float().unbind(-1)
    pairs.copy_(torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1))
    return qkv


@dataclass(frozen=True)
class Case:
    """An op, timed as `run(**make(size))`, against `plain` if that differs from its specification.

    `leaves` are the inputs that gradients pass to (none: forward only), `again` those that the
    backward has to read once more. `moved` counts the forward's bytes where they are not inputs and
    results once each, `flops` its FLOPs where they are what limits it; forward and backward have
    `backward_flops` as many.
    """

    run: Callable[..., Any]
    make: Callable[[Size], Inputs]
    kind: str = "frames"
    leaves: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    moved: Callable[[Inputs], int] | None = None
    flops: Callable[[Size], float] | None = None
    backward_flops: float = 0.0
    plain: Callable[..., Any] | None = None

    @property
    def baseline(self) -> Callable[..., Any]:
        """The same in plain PyTorch, at the same dtype."""
        return plainly(self.run) if self.plain is None else self.plain


CASES = {
    "guided_euler_step": Case(
        ops.guided_euler_step, euler_step, "mels", leaves=("x", "velocity", "displacement")
    ),
    "mean_velocity_loss": Case(
        ops.mean_velocity_loss,
        velocity_loss,
        "mels",
        leaves=("prediction",),
        again=("prediction", "displacement"),
    ),
    "modulated_layer_norm": Case(
        ops.modulated_layer_norm, norm, leaves=("x", "shift", "scale"), again=("x",)
    ),
    "gated_residual_norm": Case(
        ops.gated_residual_norm,
        residual_norm,
        leaves=("x", "h", "gate", "shift", "scale"),
        again=("x", "h"),
    ),
    "residual_layer_norm": Case(
        ops.residual_layer_norm,
        plain_residual_norm,
        leaves=("x", "h", "weight", "bias"),
        again=("x", "h"),
    ),
    "causal_conv_norm": Case(
        ops.causal_conv_norm,
        unet_block,
        leaves=("x", "weight", "bias", "gamma", "beta", "shift"),
        again=("x",),
        flops=lambda size: 2 * size.rows * size.frames * 3 * 256**2,
        backward_flops=3.0,
    ),
    "rope_qkv": Case(ops.rope_qkv, rope, leaves=("qkv",)),
    "rope_qkv in place": Case(
        functools.partial(ops.rope_qkv, in_place=True),
        rope,
        moved=lambda inputs: inputs["qkv"].nbytes * 4 // 3 + inputs["rope"].nbytes,  # no v
        plain=plain_rotation,
    ),
    "grouped_conv_mish": Case(
        ops.grouped_conv_mish,
        position_conv,
        leaves=("x", "weight", "bias", "residual"),
        again=("x",),
        flops=lambda size: 2 * size.rows * size.frames * size.dim * 64 * 31,
        backward_flops=4.0,  # the sums again, and two products
        plain=plain_conv,
    ),
    "depthwise_conv_norm": Case(
        ops.depthwise_conv_norm,
        convnext_head,
        leaves=("x", "weight", "bias", "gamma", "beta"),
        again=("x",),
    ),
    "grn_gelu": Case(ops.grn_gelu, convnext_response, leaves=("h", "gamma", "beta"), again=("h",)),
    "attention": Case(
        ops.attention,
        packed_qkv,
        "qkv",
        leaves=("qkv",),
        again=("qkv",),
        flops=lambda size: 4 * size.rows * size.frames**2 * size.dim,
        backward_flops=3.5,  # five products to the forward's two
        plain=plain_attention,
    ),
    "attention, streaming": Case(
        ops.attention,
        streaming_qkv,
        "qkv",
        flops=lambda size: 2 * size.rows * size.frames * (size.frames + 50) * size.dim,
        plain=plain_attention,
    ),
    "cached_attention": Case(
        ops.cached_attention,
        cached_qkv,
        "qkv",
        flops=lambda size: 4 * size.rows * min(50, size.frames) * size.frames * size.dim,
        plain=plain_cached_attention,
    ),
    "ragged_copy": Case(copied, requests),
}


def nbytes(tree: Any) -> int:
    """Of all tensors in it, each once."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def differentiable(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.grad_fn]


class Call:
    """Inputs of one call, with what a backward needs besides."""

    def __init__(self, case: Case, inputs: Inputs, backward: bool) -> None:
        self.inputs, self.leaves, self.grads = inputs, [], []
        if backward:
            self.leaves = [inputs[name].requires_grad_() for name in case.leaves]
            outputs = differentiable(plainly(case.run)(**inputs))
            self.grads = [torch.randn_like(output) for output in outputs]

    def gradients(self, outputs: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(differentiable(outputs), self.leaves, self.grads)


def batch(calls: list[Call], run: Callable[..., Any]) -> Run:
    """All calls, one after the other; results are kept, so that each has memory of its own."""

    def forward() -> Any:
        with torch.set_grad_enabled(bool(calls[0].leaves)):
            outputs = [run(**call.inputs) for call in calls]
        if not calls[0].leaves:
            return outputs
        return [call.gradients(output) for call, output in zip(calls, outputs, strict=True)]

    return forward


def results(case: Case, run: Callable[..., Any], size: Size, backward: bool, exact: bool) -> list:
    """Outputs and gradients on the same inputs every time, in float64 if `exact`."""
    torch.manual_seed(0)
    call = Call(case, case.make(size), backward)
    if exact:
        call.inputs = tree_map(_double, call.inputs)
        call.leaves = [call.inputs[name].detach().requires_grad_() for name in case.leaves]
        call.inputs |= dict(zip(case.leaves, call.leaves, strict=True))
        call.grads = tree_map(_double, call.grads)
    with torch.set_grad_enabled(backward):
        outputs = run(**call.inputs)
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return [*tensors, *call.gradients(outputs)] if backward else tensors


def _double(leaf: Any) -> Any:
    if isinstance(leaf, torch.dtype):
        return torch.float64
    floats = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return leaf.detach().double() if floats else leaf


def differences(got: list[Tensor], want: list[Tensor]) -> list[float]:
    return [error(*pair) for pair in zip(got, want, strict=True)]


def work(case: Case, call: Call, size: Size) -> tuple[int, float]:
    """Bytes and FLOPs of a call."""
    moved = case.moved(call.inputs) if case.moved else 0
    if case.moved is None:
        moved = nbytes((call.inputs, plainly(case.run)(**call.inputs)))
    flops = case.flops(size) if case.flops else 0.0
    if call.leaves:
        again = [call.inputs[name] for name in case.again]
        moved += nbytes((again, call.grads)) + nbytes(call.leaves)  # a gradient is like its leaf
        flops *= case.backward_flops
    return moved, flops


SELECTED = {
    "cpu": (["short"], ["forward"]),
    "gpu": (["large", "speech"], ["forward", "backward"]),
    "full": (["large", "speech", "speech8"], ["forward", "backward"]),
    "tiny": (["tiny"], ["forward", "backward"]),
}


def rows(conditions: Conditions) -> list[Row]:
    sizes, passes = SELECTED[conditions.selection]
    return [
        conditions.row(**{"op": name, "pass": way, "size": size})
        for size, way, name in itertools.product(sizes, passes, CASES)
        if way == "forward" or CASES[name].leaves
    ]


def compiles(row: Row, conditions: Conditions) -> bool:
    """Whether a row has torch.compile too, which takes seconds of every row."""
    if conditions.tiny:
        return row["op"] == "modulated_layer_norm"
    return conditions.selection == "full" or (row["size"] == "speech" and row["pass"] == "forward")


@pytest.mark.rows(of=rows)
def test_ops(row: Row, contest: Contest, ceilings: Ceilings) -> None:
    conditions, device = contest.conditions, contest.device
    case, backward = CASES[row["op"]], row["pass"] == "backward"
    small = {"dim": 64, "heads": 1} if conditions.tiny else {}
    size = Size(*SIZES[row["size"]][case.kind], conditions.dtype, **small)
    with device, torch.enable_grad():
        check = functools.partial(results, case, size=size, backward=backward)
        exact = check(plainly(case.run), exact=True)
        plain = differences(check(case.baseline, exact=False), exact)
        calls = [Call(case, case.make(size), backward)]
        moved, flops = work(case, calls[0], size)
        if conditions.cuda:
            count = min(max(math.ceil(8 * l2_bytes(device) / moved), 2), 160)
            calls += [Call(case, case.make(size), backward) for _ in range(count - 1)]

        def compiled() -> Callable[..., Any]:
            if not compiles(row, conditions):
                raise Unavailable("compilation takes seconds (full selection)")
            backend = "eager" if conditions.tiny else "inductor"
            run = case.plain or case.run
            return plainly(torch.compile(run, dynamic=False, backend=backend))

        makers = {
            "ours": ("ours", lambda: case.run),
            "plain": ("baseline", lambda: case.baseline),
            "torch.compile": ("peer", compiled),
        }
        for name, (role, make) in makers.items():
            run = functools.cache(make)
            contest.enter(
                name,
                lambda run=run: graphed(batch(calls, run()), device),
                lambda _, run=run: worst(
                    differences(check(run(), exact=False), exact), [allowed(e) for e in plain]
                ),
                role=role,
                bytes=moved,
                flops=flops,
                floor_seconds=limit(flops, moved, ceilings),
            )
        contest.time(None, calls=len(calls), share=0.25)
