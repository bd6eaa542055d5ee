"""Algorithm 1: positions one after the other, in sweeps, until nothing is gained."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from imf_kernels import checks, grids
from imf_kernels.o3s.brackets import METHODS
from imf_kernels.o3s.metric import Metric, ranks_of
from imf_kernels.o3s.result import Evaluation, SearchResult, ascending
from imf_kernels.profiling import span


def search(
    metric: Metric,
    nfe: int,
    *,
    higher_is_better: bool,
    start: str | Tensor | Sequence[float] = "uniform",
    method: str = "ternary",
    tolerance: float = 0.02,
    min_gap: float = 1e-3,
    min_gain: float = 0.0,
    budget: int | None = None,
    max_sweeps: int | None = None,
    resume: SearchResult | None = None,
    save_to: str | Path | None = None,
    callback: Callable[[Evaluation, SearchResult], None] | None = None,
) -> SearchResult:
    """Algorithm 1 over grids of `nfe` steps.

    The curve over one position is near-convex, not convex: the best evaluated point is kept, never
    only the bracket's centre. Grids already evaluated cost nothing.

    A metric that ranks evaluate together (`sharded`, `on_batches`) is searched by all of them
    together, each calling this with the same arguments. All return the same result; rank 0's
    `resume` counts, and rank 0 alone writes.

    Args:
        metric: Called with a float32 CPU grid `(nfe + 1,)`; a NaN counts as worst, and is an error
            for the start. It should give equal grids equal values: use one noise for all
            (`on_samples` does).
        nfe: Steps; nfe = 1 has nothing to search and evaluates the start only.
        higher_is_better: The metric's direction.
        start: First grid, a name or times.
        method: How a position's bracket is narrowed: "ternary" search, as published, or "golden"
            sections, which take about half as many evaluations, but more easily miss the best of a
            metric that has steps, such as the error rate of a few words.
        tolerance: A position's search ends when its bracket is this narrow.
        min_gap: Least distance of neighbouring times.
        min_gain: A position's search was in vain unless it gained more than this. Where positions
            interact, tiny gains otherwise keep the sweeps going.
        budget: At most this many paid evaluations, those of `resume` included.
        max_sweeps: At most this many sweeps over the positions.
        resume: Continue this search; its settings must be the same.
        save_to: Write the result there after every paid evaluation.
        callback: Called, on every rank, with each paid evaluation and the result so far.

    Raises:
        ValueError: bad arguments, NaN for the start, other settings than on other ranks, or
            `resume` from a search with other settings.
        RuntimeError: another rank failed, in the metric, the callback or in writing; it says which
            and why.
    """
    checks.positive_int("nfe", nfe)
    checks.choice("method", method, tuple(METHODS))
    if not tolerance > 0:
        raise ValueError(f"tolerance: expected a number > 0, got {tolerance}")
    if not 0 < min_gap < 1 / nfe:
        raise ValueError(f"min_gap: expected a number in (0, 1 / nfe), got {min_gap}")
    if not min_gain >= 0:
        raise ValueError(f"min_gain: expected a number >= 0, got {min_gain}")
    if budget is not None:
        checks.positive_int("budget", budget)
    if max_sweeps is not None:
        checks.positive_int("max_sweeps", max_sweeps)
    first = grids.validate(grids.make(start, nfe, name="start"), min_gap=min_gap, name="start")
    result = SearchResult(
        nfe,
        higher_is_better,
        tuple(first.tolist()),
        tolerance,
        min_gap,
        min_gain,
        method=method,
    )
    ranks = ranks_of(metric)
    ranks.same("settings", lambda: (result, budget, max_sweeps))
    resume = ranks.first(lambda: resume)
    if resume is not None:
        given = replace(resume, evaluations=[], stopped="running")
        if given != result:
            raise ValueError(
                f"resume: expected a search with the settings of {result}, got {given}"
            )
        result.evaluations = list(resume.evaluations)

    def save() -> None:
        if save_to is not None and ranks.rank == 0:
            result.save(save_to)

    def paid(evaluation: Evaluation) -> None:
        save()
        if callback is not None:
            callback(evaluation, result)

    run = _Search(metric, result, budget, lambda evaluation: ranks.each(lambda: paid(evaluation)))
    with contextlib.suppress(_BudgetSpent):
        run(max_sweeps)
    ranks.each(save)
    return result


class _BudgetSpent(Exception):
    pass


class _Search:
    def __init__(
        self,
        metric: Metric,
        result: SearchResult,
        budget: int | None,
        paid: Callable[[Evaluation], object],
    ) -> None:
        self.metric, self.result, self.budget, self.paid = metric, result, budget, paid
        self.known = {e.grid: e.value for e in result.evaluations}
        self.cost = ascending(result.higher_is_better)
        self.sweep: int | None = None
        self.position: int | None = None

    def __call__(self, max_sweeps: int | None) -> None:
        nfe = self.result.nfe
        grid = self.result.start
        best = self.evaluate(grid)
        if math.isnan(self.known[grid]):
            raise ValueError(f"metric: expected a number for the start {list(grid)}, got nan")
        in_vain, sweep = 0, 0
        while nfe > 1 and in_vain < nfe:
            if sweep == max_sweeps:
                self.result.stopped = "sweeps"
                return
            for position in range(nfe - 1, 0, -1):
                self.sweep, self.position = sweep, position
                found, cost = self.move(grid, position)
                in_vain = 0 if cost < best - self.result.min_gain else in_vain + 1
                if cost < best:
                    grid, best = found, cost
                if in_vain == nfe:
                    break
            sweep += 1
        self.result.stopped = "converged"

    def move(self, grid: tuple[float, ...], position: int) -> tuple[tuple[float, ...], float]:
        """The best grid with `position` moved between its neighbours, and its cost."""
        low = grid[position - 1] + self.result.min_gap
        high = grid[position + 1] - self.result.min_gap
        tried = {grid[position]: self.evaluate(grid)}

        def at(time: float) -> float:
            time = float(torch.tensor(time, dtype=torch.float32))
            tried[time] = self.evaluate((*grid[:position], time, *grid[position + 1 :]))
            return tried[time]

        def best() -> float:
            return min(tried, key=tried.__getitem__)

        METHODS[self.result.method](at, best, low, high, self.result.tolerance)
        time = best()
        return (*grid[:position], time, *grid[position + 1 :]), tried[time]

    def evaluate(self, grid: tuple[float, ...]) -> float:
        """The cost of a grid, lower is better; paid for once."""
        if grid not in self.known:
            if self.budget is not None and len(self.result.evaluations) >= self.budget:
                self.result.stopped = "budget"
                raise _BudgetSpent
            with span("o3s candidate"):
                value = float(self.metric(torch.tensor(grid, dtype=torch.float32)))
            self.known[grid] = value
            evaluation = Evaluation(grid, value, self.sweep, self.position)
            self.result.evaluations.append(evaluation)
            self.paid(evaluation)
        return self.cost(self.known[grid])
