"""What a model prepares once per utterance batch: a flat set of tensors, no Python scalars."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from imf_kernels.rows import Rows


@dataclass(frozen=True)
class TensorSpec:
    """Declares one tensor of a model's conditioning: dimensions, dtype and padding value.

    "rows" and "frames" are what a static buffer pads, "rows" always first; "total" are the frames
    of rows behind one another; "tokens" is a length of its own, of which what exceeds the frames is
    not used; every other dimension is a number fixed by the model. `dtype` None stands for the
    model's own, or autocast's under it.
    """

    dims: tuple[str | int, ...]
    dtype: torch.dtype | None
    pad: float = 0.0
    short: bool = False
    """Whether a row given to `prepare` may have fewer frames than are generated."""

    def shape(self, rows: int, frames: int, total: int = 0) -> tuple[int, ...]:
        sizes = {"rows": rows, "frames": frames, "tokens": frames, "total": total}
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.dims)


class Layout(NamedTuple):
    """Where rows lie for evaluations of `batch` rows, those of both branches; for packed rows also
    those of one branch, for padded rows the frames beyond each row's length, bool `(R, N, 1)`."""

    batch: int
    rows: Rows
    branch: Rows | None = None
    outside: Tensor | None = None


class Conditioning(Mapping[str, Tensor]):
    """Prepared tensors by name. Holds `lengths` `(R,)`; R = 2B when prepared for guidance, with
    rows `[0:B]` conditional and `[B:2B]` unconditional.

    `layout` is None but within a solve, whose evaluations all have the same (`Estimator.lay_out`).
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        specs: Mapping[str, TensorSpec],
        layout: Layout | None = None,
    ) -> None:
        self._tensors = dict(tensors)
        self.specs = {name: specs[name] for name in self._tensors}
        self.layout = layout

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in self.items())
        return f"Conditioning({shapes})"

    @property
    def rows(self) -> int:
        return self["lengths"].shape[0]

    def take(self, rows: slice | Tensor) -> Conditioning:
        """The conditioning of some rows: a slice (views) or an index tensor (copies).

        Raises:
            ValueError: the rows are packed.
        """
        packed = [name for name, spec in self.specs.items() if spec.dims[0] == "total"]
        if packed:
            raise ValueError(f"rows: expected padded ones to take from, got packed: {packed}")
        return Conditioning(
            {
                name: tensor[rows] if self.specs[name].dims[0] == "rows" else tensor
                for name, tensor in self.items()
            },
            self.specs,
        )

    def conditional(self, rows: int) -> Conditioning:
        """The conditional half, B = `rows`, of a conditioning prepared for guidance.

        Raises:
            ValueError: not prepared for guidance of that many rows.
        """
        if self.rows != 2 * rows:
            raise ValueError(f"rows: expected half of the {self.rows} prepared rows, got {rows}")
        halved = [name for name, spec in self.specs.items() if spec.dims[0] in ("rows", "total")]
        halves = {name: self[name].chunk(2)[0] for name in halved}
        return Conditioning({**self, **halves}, self.specs)

    def to(self, device: torch.device | str) -> Conditioning:
        return Conditioning({k: v.to(device) for k, v in self.items()}, self.specs)
