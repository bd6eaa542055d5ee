"""Reading a client's state dict: its common prefix, and the sizes that its names tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


def without_prefix(
    state_dict: Mapping[str, Tensor], root: str, needed: Sequence[str]
) -> Mapping[str, Tensor]:
    """A model's own entries, without what stands before `root`, one of its keys.

    Raises:
        ValueError: one of `needed`, of which sizes are read, is missing.
    """
    prefix = next((k.removesuffix(root) for k in state_dict if k.endswith(root)), "")
    own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    for key in needed:
        if key not in own:
            raise ValueError(f"state_dict: expected the key {key!r}, got {list(state_dict)[:3]}...")
    return own


def count(names: Mapping[str, object], prefix: str) -> int:
    """How many indices follow a prefix: the length of a module list."""
    indices = {name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)}
    return len(indices)
