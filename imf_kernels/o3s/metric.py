"""A metric of grids, and the ranks that evaluate it together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

Metric = Callable[[Tensor], float]
"""Of a float32 CPU grid `(nfe + 1,)`. One that ranks evaluate together has them as `ranks`."""

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Processes that make the same calls in the same order; by default this one alone."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup | None = None) -> Ranks:
        """Those of a group; None: of the default group, where there is one.

        Raises:
            ValueError: a group that this process is not in.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(f"group: expected one with this process, got {group}")
        return cls(rank, dist.get_world_size(group), group)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def collect(self, value: T) -> list[T]:
        """On rank 0 every rank's value, in the order of the ranks; elsewhere none."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size if self.rank == 0 else []
        dist.gather_object(value, values or None, group=self.group, group_dst=0)
        return values

    def each(self, function: Callable[[], T]) -> list[T]:
        """What every rank makes of its own function, in the order of the ranks.

        Raises:
            RuntimeError: on all ranks, naming those that failed and why. Alone, the error itself.
        """
        if self.size == 1:
            return [function()]
        value: Any = None
        failure = None
        try:
            value = function()
        except Exception as error:
            failure = error
        said = None if failure is None else f"{type(failure).__name__}: {failure}"
        made = self.gather((value, said))
        failed = [f"rank {k} of {self.size}: {said}" for k, (_, said) in enumerate(made) if said]
        if failed:
            raise RuntimeError("; ".join(failed)) from failure
        return [value for value, _ in made]

    def first(self, function: Callable[[], T]) -> T:
        """What rank 0 makes, on all ranks. Errors as in `each`."""
        made: list[Any] = self.each(lambda: function() if self.rank == 0 else None)
        return made[0]

    def same(self, name: str, function: Callable[[], T]) -> T:
        """What every rank makes, if it is the same everywhere. Other errors as in `each`.

        Raises:
            ValueError: on all ranks: it is not.
        """
        made = self.each(function)
        if any(value != made[0] for value in made):
            said = "; ".join(map(str, made))
            raise ValueError(f"{name}: expected the same on every rank, got {said}")
        return made[0]


def ranks_of(metric: Metric) -> Ranks:
    """Who has to call a metric together."""
    return getattr(metric, "ranks", Ranks())
