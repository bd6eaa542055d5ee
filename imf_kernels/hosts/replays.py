"""Solves of a host through CUDA graphs, where it was asked to capture them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from imf_kernels.graphs import GraphSampler


class Replays:
    """Holds a `GraphSampler` of a host's model outside of its module tree.

    Copies of a host begin without: the graphs read the weights of the first.
    """

    sampler: GraphSampler | None = None

    def capture(
        self,
        model: Any,
        nfe: int | None,
        guidance: float | None,
        buckets: Iterable[tuple[int, ...]],
        slots: int,
    ) -> GraphSampler:
        """In the place of an earlier one, which is closed."""
        sampler = GraphSampler(model, nfe, buckets, guidance, slots)
        if self.sampler is not None:
            self.sampler.close()
        self.sampler = sampler
        return sampler

    def of(self, model: Any, grid: Tensor, w: float | None) -> GraphSampler | None:
        """The sampler, if it was made for this model and as many steps, guided or not."""
        sampler = self.sampler
        if sampler is None or sampler.model is not model or sampler.nfe != len(grid) - 1:
            return None
        return sampler if (sampler.guidance is None) == (w is None) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Replays:
        return Replays()

    def __reduce__(self) -> tuple[Any, ...]:
        return Replays, ()
