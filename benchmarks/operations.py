"""The operations of a call: what PyTorch dispatches, with FLOPs and bytes of each.

FLOPs are those of matrix products, convolutions and attention; bytes are what an operation reads
and writes, each tensor once, whether or not a cache holds it. Views are none.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import imf_kernels  # noqa: F401  its ops


class Operation(NamedTuple):
    """One call of an operator, "imf_kernels.attention" by the dispatcher's name."""

    name: str
    flops: int
    nbytes: int
    shapes: tuple[tuple[int, ...], ...]
    """Of the tensors that it is given."""


class Count(NamedTuple):
    """Operations, FLOPs and bytes of a call; `by_name` for the curious.

    `nbytes` are read and written; `held` is the most that lay in storages made since its start and
    not freed yet.
    """

    operations: int
    flops: int
    nbytes: int
    held: int
    by_name: Counter[str]


class Recording(TorchDispatchMode):
    """Keeps every operation, and the memory that they hold, of real tensors or of "meta" ones."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.alive = self.held = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        out = self.run(func, args, kwargs)
        if not (func.is_view or func.namespace == "prim" or "detach" in str(func)):
            self.operations.append(_operation(func, args, kwargs, out))
        given = {_address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _address(tensor) not in given | self.storages:
                self._hold(tensor.untyped_storage())
        return out

    def run(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _hold(self, storage: torch.UntypedStorage) -> None:
        address, nbytes = storage._cdata, storage.nbytes()
        self.storages.add(address)
        self.alive += nbytes
        self.held = max(self.held, self.alive)
        weakref.finalize(storage, self._free, address, nbytes)

    def _free(self, address: int, nbytes: int) -> None:
        self.storages.discard(address)
        self.alive -= nbytes


def count(evaluate: Callable[[], Any]) -> Count:
    """What `evaluate` does; tensors of the "meta" device suffice."""
    with Recording() as seen:
        evaluate()
    operations = seen.operations
    return Count(
        len(operations),
        sum(each.flops for each in operations),
        sum(each.nbytes for each in operations),
        seen.held,
        Counter(each.name for each in operations),
    )


def _address(tensor: Tensor) -> int:
    """Of the storage itself: without data there is no other."""
    return tensor.untyped_storage()._cdata


def _operation(func: Any, args: Any, kwargs: Mapping[str, Any], out: Any) -> Operation:
    name = str(func.overloadpacket)
    read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    written += [t for t in _mutated(func, args, kwargs) if all(t is not each for each in written)]
    nbytes = sum(t.nbytes for t in (*read, *written))
    if name in PARTLY:
        nbytes = PARTLY[name](*args, **kwargs)
    formula = _formulas().get(name)
    flops = int(formula(*args, **kwargs, out_val=out)) if formula else 0
    return Operation(name, flops, nbytes, tuple(tuple(t.shape) for t in read))


def _mutated(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operator's schema says it changes in place."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [t for t in tree_leaves(given) if isinstance(t, Tensor)]
    return found


@functools.cache
def _formulas() -> dict[str, Callable[..., int]]:
    """FLOPs of a call, by the operator's name."""
    known = {str(packet): formula for packet, formula in flop_counter.flop_registry.items()}
    return known | {name: flop_counter.shape_wrapper(formula) for name, formula in OURS.items()}


def _attention(qkv: Any, starts: Any, *_: Any, **__: Any) -> int:
    """Of rows that fill their frames evenly; there is a start more than rows."""
    frames, _, heads, width = qkv
    return 4 * frames * (frames // max(starts[0] - 1, 1)) * heads * width


def _attention_backward(
    grad: Any, qkv: Any, out: Any, lse: Any, starts: Any, *_: Any, **__: Any
) -> int:
    """Five products, the scores again among them, for the forward pass's two."""
    return 5 * _attention(qkv, starts) // 2


def _conv(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * x[0] * math.prod(weight)


def _conv_backward(grad: Any, x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Of the input, of the weight, and the forward pass again, whose result was not kept."""
    return 3 * _conv(x, weight)


def _addmm(bias: Any, a: Any, b: Any, **_: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _linear(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _sdpa(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return flop_counter.sdpa_flop_count(q, k, v)


OURS: dict[str, Callable[..., int]] = {
    "imf_kernels.attention": _attention,
    "imf_kernels.attention_backward": _attention_backward,
    "imf_kernels.causal_conv": _conv,
    "imf_kernels.grouped_conv_mish": _conv,
    "imf_kernels.grouped_conv_mish_backward": _conv_backward,
    "aten._addmm_activation": _addmm,
    "aten._scaled_dot_product_flash_attention_for_cpu": _sdpa,
    "mkldnn._linear_pointwise": _linear,
}
"""What PyTorch's own counter does not know, by shapes."""


def _rope_in_place(qkv: Tensor, rope: Tensor, *where: Any) -> int:
    """The heads of q and k that it turns or normalises, read and written."""
    *_, heads, weight, _, _ = where
    touched = heads if weight is None else qkv.shape[2]
    return rope.nbytes + 2 * qkv[:, :2, :touched].nbytes


def _embedding(weight: Tensor, ids: Tensor, *_: Any, **__: Any) -> int:
    """The rows that are asked for, read and written."""
    return ids.nbytes + 2 * ids.numel() * weight[0].nbytes


PARTLY: dict[str, Callable[..., int]] = {
    "aten.embedding": _embedding,
    "imf_kernels.rope_qkv_": _rope_in_place,
}
"""Bytes of operations that leave a part of their tensors alone."""
