"""What an objective remembers between calls, flat: what a checkpoint keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor | int | float | bool | str]
"""Tensors, on the CPU and of a storage of their own, and plain values, by names with dots."""


class Stateful:
    """Goes on from `load_state_dict` as the one that `state_dict` was taken of, to the bit.

    Of generators only those that were given are remembered; torch's own is the caller's to seed.
    """

    generator: torch.Generator | None

    def state_dict(self) -> State:
        """All that later calls depend on, beside the arguments; {} where that is nothing."""
        return flat(self.remembered())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; the arguments are to be the same.

        Raises:
            ValueError: a state of other parts, such as one without the generator that this has.
        """
        self.recall(nested(state))

    def remembered(self) -> dict[str, Any]:
        return {} if self.generator is None else {"generator": self.generator.get_state()}

    def recall(self, held: Mapping[str, Any]) -> None:
        """Take `remembered` back; who remembers more takes that out before."""
        wanted = [] if self.generator is None else ["generator"]
        if list(held) != wanted:
            raise ValueError(f"state: expected {wanted} beside other parts, got {list(held)}")
        if self.generator is not None:
            self.generator.set_state(held["generator"].cpu())


def flat(value: Any, name: str = "") -> State:
    """Nested mappings, sequences, dataclasses and named tuples as one dict; None is left out.

    Raises:
        TypeError: something else, named.
    """
    if value is None:
        return {}
    if isinstance(value, Tensor):
        return {name: value.detach().to("cpu", copy=True).contiguous()}
    if isinstance(value, int | float | str):
        return {name: value}
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    elif isinstance(value, list | tuple):
        value = {str(i): item for i, item in enumerate(value)}
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected tensors and plain values, got {type(value).__name__}")
    ahead = f"{name}." if name else ""
    return {k: v for key, item in value.items() for k, v in flat(item, f"{ahead}{key}").items()}


def nested(state: Mapping[str, Any]) -> Any:
    """The inverse of `flat`, with mappings for dataclasses, and lists for all sequences."""
    parts: dict[str, Any] = {}
    for name, value in state.items():
        key, _, rest = name.partition(".")
        if rest:
            parts.setdefault(key, {})[rest] = value
        else:
            parts[key] = value
    made = {k: nested(v) if isinstance(v, dict) else v for k, v in parts.items()}
    if made and all(key.isdecimal() for key in made):
        return [made[str(i)] for i in range(len(made))]
    return made
