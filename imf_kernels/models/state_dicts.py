"""Reading a client's state dict: its prefix, the sizes that it tells, and the model that it fits.

Nothing is allocated before every key, shape and dtype is what the sizes ask for.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from imf_kernels import checks

MIXER = "time_embed_mixer.weight"
"""The one key that may be missing: a teacher's, for which a student fills in the identity."""
GUIDANCE = "guidance_embed."
"""What the keys of a student that is told the guidance begin with, besides."""

Shapes = Mapping[str, tuple[int, ...]]
Model = TypeVar("Model", bound=nn.Module)


def prefix(state_dict: Mapping[str, Any], root: str) -> str:
    """What stands before `root`, a key of every state dict of a family.

    Raises:
        ValueError: no such key, or several.
    """
    found = [key for key in state_dict if key == root or key.endswith(f".{root}")]
    if len(found) != 1:
        raise ValueError(
            f"state_dict: expected the key {root!r} under one prefix, "
            f"got {few(found or state_dict)} {'such keys' if found else 'keys'}"
        )
    return found[0].removesuffix(root)


def without_prefix(state_dict: Mapping[str, Any], root: str) -> dict[str, Tensor]:
    """A model's own entries, without what stands before `root`.

    Raises:
        ValueError: see `prefix`; an entry that is no tensor.
    """
    ahead = prefix(state_dict, root)
    own = {k.removeprefix(ahead): v for k, v in state_dict.items() if k.startswith(ahead)}
    for name, value in own.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
    return own


def shape(shapes: Shapes, key: str, ndim: int) -> tuple[int, ...]:
    """The shape of an entry that sizes are read from.

    Raises:
        ValueError: no such key, another number of dimensions, or one of size 0.
    """
    if key not in shapes:
        raise ValueError(f"state_dict: expected the key {key!r}, got {few(shapes)} keys")
    if len(shapes[key]) != ndim or 0 in shapes[key]:
        raise ValueError(f"{key}: expected {ndim} dimensions, none of them 0, got {shapes[key]}")
    return shapes[key]


def count(names: Iterable[str], prefix: str) -> int:
    """How many indices follow a prefix: the length of a module list."""
    return len(
        {name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)}
    )


def ours(name: str) -> bool:
    """Whether a key is of a student only, unknown to the clients."""
    return name == MIXER or name.startswith(GUIDANCE)


def told_guidance(shapes: Shapes) -> bool:
    """Whether a state dict is of a student that is told the guidance."""
    return any(name.startswith(GUIDANCE) for name in shapes)


def check(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Whether `given` loads in place of `expected`; the mixer may be missing.

    Raises:
        ValueError: naming the missing and unexpected keys, or the key with its expected and given
            shape or dtype.
    """
    missing = [name for name in expected if name not in given and name != MIXER]
    unexpected = [name for name in given if name not in expected]
    if missing or unexpected:
        raise ValueError(
            f"state_dict: expected {len(expected)} keys, got {len(given)}: "
            f"missing {few(missing)}, unexpected {few(unexpected)}"
        )
    wrong = [name for name, value in given.items() if value.shape != expected[name].shape]
    for name in wrong[:1]:
        raise ValueError(
            f"{name}: expected shape {tuple(expected[name].shape)}, "
            f"got {tuple(given[name].shape)} (one of {len(wrong)} such keys)"
        )
    for name, value in given.items():
        if value.dtype not in checks.FLOATING or value.layout != torch.strided or value.is_meta:
            wanted = ", ".join(map(str, checks.FLOATING))
            raise ValueError(
                f"{name}: expected dense weights in one of {wanted}, "
                f"got {value.dtype} ({value.layout}, {value.device})"
            )


def load(
    build: Callable[[], Model],
    blocks: int,
    state_dict: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> Model:
    """What `build` makes, on the CPU with these weights, allocated once they are found to fit.

    Args:
        blocks: How many transformer blocks it will have.

    Raises:
        ValueError: see `check`; sizes that contradict each other; weights that are not finite.
    """
    if len(state_dict) < _KEYS_PER_BLOCK * blocks:  # before as many blocks are built
        raise ValueError(
            f"state_dict: expected at least {_KEYS_PER_BLOCK * blocks} keys "
            f"for {blocks} blocks, got {len(state_dict)}"
        )
    try:
        with torch.device("meta"):
            model = build().to(dtype=dtype)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"state_dict: expected the sizes of a model, got {error}") from error
    check(model.state_dict(), state_dict)
    model.to_empty(device="cpu").load_state_dict(state_dict)
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            wrong = int((~weight.isfinite()).sum())
            raise ValueError(f"{name}: expected finite weights, got {wrong} that are not")
    return model


def fingerprint(said: str, own: Mapping[str, Tensor]) -> str:
    """SHA-256 of what is said of a model and of its weights' names, dtypes, shapes and bytes,
    wherever they are."""
    digest = hashlib.sha256(f"{said}\n".encode())
    for name in sorted(own):
        value = own[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update((ctypes.c_char * value.nbytes).from_address(value.data_ptr()))
    return digest.hexdigest()


def few(names: Iterable[str]) -> str:
    """How many, and the first of them."""
    names = list(names)
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} ({', '.join(names[:3])}{more})" if names else "0"


_KEYS_PER_BLOCK = 8
"""No transformer block has fewer (text 10, U-Net 13, DiT 14)."""
