"""A development set evaluated by several ranks, to the same number on any number of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

from imf_kernels.o3s.metric import Ranks

Evaluate = Callable[[Tensor, list[Any]], Sequence[Any] | Tensor]
Item = TypeVar("Item", covariant=True)


class Items(Protocol[Item]):
    """A list, or what makes its items when they are read (`data.Utterances`)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Item: ...


def mean(values: Sequence[float]) -> float:
    """In float64, in the order of the values."""
    return sum(map(float, values)) / len(values)


def sharded(
    evaluate: Evaluate,
    items: Items[Any],
    *,
    costs: Sequence[float] | None = None,
    reduce: Callable[[list[Any]], float] = mean,
    group: dist.ProcessGroup | None = None,
) -> Sharded:
    """A metric of grids over a list of items, of which every rank evaluates a share.

    Every rank of the group makes the metric and calls it with the same arguments. The items' values
    go to rank 0, which reduces them in float64, in the order of the items, and tells the others the
    result: the same to the bit on any number of ranks, if an item's value does not depend on the
    items beside it.

    Args:
        evaluate: `evaluate(grid, items)` returns a value for each of this rank's items, in their
            order: numbers or a tensor `(n,)`; or whatever `reduce` takes and `pickle` too, such as
            pairs of errors and words. Not called for no items.
        items: At least one; the same list on every rank. A rank reads those of its share, once.
        costs: What each item costs (its frames), so that the shares cost about the same. None: the
            same.
        reduce: Makes a number of all items' values, for metrics that are no mean. Rank 0's is
            called.
        group: Of torch.distributed; None: its default group, or without one this process alone.

    Raises:
        ValueError: no items, other costs than items, negative or NaN ones; a group without this
            process; by the metric, other grids or items than on other ranks.
        RuntimeError: here or by the metric, on all ranks: one of them failed; it says which and
            why. A single process raises its own error.
    """
    return Sharded(evaluate, items, costs, reduce, Ranks.of(group))


class Sharded:
    """See `sharded`."""

    def __init__(
        self,
        evaluate: Evaluate,
        items: Items[Any],
        costs: Sequence[float] | None,
        reduce: Callable[[list[Any]], float],
        ranks: Ranks,
    ) -> None:
        count = len(items)
        if not count:
            raise ValueError("items: expected at least one, got none")
        costs = [1.0] * count if costs is None else costs
        if len(costs) != count or not all(cost >= 0 for cost in costs):
            raise ValueError(f"costs: expected {count} numbers >= 0, got {costs}")
        self.evaluate, self.reduce, self.ranks, self.count = evaluate, reduce, ranks, count
        self.share = deal(costs, ranks.size)[ranks.rank]
        self.items: list[Any] = []
        ranks.each(lambda: self.items.extend(items[index] for index in self.share))

    def __call__(self, grid: Tensor) -> float:
        self.ranks.same("grid", grid.tolist)
        own: dict[int, Any] = {}

        def evaluate() -> tuple[int, list[int]]:
            own.update(self.of_share(grid))
            return self.count, list(own)

        dealt = self.ranks.each(evaluate)
        counts = [count for count, _ in dealt]
        indices = {index for _, share in dealt for index in share}
        if len({*counts, len(indices)}) > 1:
            raise ValueError(
                f"items: expected the same list and costs on every rank, got {counts} items "
                f"and {len(indices)} values"
            )
        shares = self.ranks.collect(own)  # values may be as large as mels
        values = {index: value for share in shares for index, value in share.items()}
        return self.ranks.first(
            lambda: float(self.reduce([values[index] for index in range(self.count)]))
        )

    def of_share(self, grid: Tensor) -> dict[int, Any]:
        """The values of this rank's items, by index."""
        if not self.items:
            return {}
        values = [plain(value) for value in plain(self.evaluate(grid, self.items))]
        if len(values) != len(self.items):
            raise ValueError(
                f"evaluate: expected {len(self.items)} values, one an item, got {len(values)}"
            )
        return dict(zip(self.share, values, strict=True))


def deal(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Each rank's indices, ascending: the dearest first, to whom has the least so far."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        least = min(range(ranks), key=lambda rank: (loads[rank], len(shares[rank])))
        shares[least].append(index)
        loads[least] += costs[index]
    return [sorted(share) for share in shares]


def plain(value: Any) -> Any:
    """Python's own numbers and lists instead of a tensor, which may be on some rank's device, or an
    array."""
    return value.tolist() if hasattr(value, "tolist") else value
