"""O3S: search of the best step positions for a fixed NFE (arXiv 2510.07979, Algorithm 1).

From the uniform grid, for i = n-1 down to 1, ternary-search t_i between its neighbours for the best
metric with the others fixed; go on in sweeps until n position searches in a row brought nothing.
The metric is the user's: any callable of a grid, higher or lower better.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imf_kernels import checks, grids
from imf_kernels.files import replacing
from imf_kernels.graphs import GraphSampler
from imf_kernels.sampler import sample
from imf_kernels.solver import VelocityModel

Metric = Callable[[Tensor], float]


@dataclass(frozen=True)
class Evaluation:
    """One evaluated grid. `sweep` and `position` say what it was tried for (None: the start)."""

    grid: tuple[float, ...]
    value: float
    sweep: int | None
    position: int | None


@dataclass
class SearchResult:
    """What a search found, all it evaluated, and the settings that define it.

    A result is resumable: `search(..., resume=result)` repeats the same decisions from the
    evaluations it holds and pays only for new ones.

    Attributes:
        nfe, higher_is_better, start, tolerance, min_gap, min_gain: The settings.
        evaluations: Every paid evaluation, in order.
        stopped: "converged", "budget" or "sweeps"; "running" until then.
    """

    nfe: int
    higher_is_better: bool
    start: tuple[float, ...]
    tolerance: float
    min_gap: float
    min_gain: float
    evaluations: list[Evaluation] = field(default_factory=list)
    stopped: str = "running"

    @property
    def best(self) -> Evaluation:
        """The best evaluation; the earliest among equals, so never worse than the start."""
        if not self.evaluations:
            raise ValueError("evaluations: expected at least one, got none")
        key = _ascending(self.higher_is_better)
        return min(self.evaluations, key=lambda evaluation: key(evaluation.value))

    @property
    def grid(self) -> Tensor:
        """The best grid, float32 `(nfe + 1,)`."""
        return torch.tensor(self.best.grid, dtype=torch.float32)

    @property
    def value(self) -> float:
        return self.best.value

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        with replacing(Path(path)) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> SearchResult:
        """Read what `save` wrote.

        Raises:
            ValueError: not a saved search; the error names the file.
        """
        try:
            saved = json.loads(Path(path).read_text())
            saved["start"] = tuple(saved["start"])
            saved["evaluations"] = [
                Evaluation(**{**item, "grid": tuple(item["grid"])}) for item in saved["evaluations"]
            ]
            return cls(**saved)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"path: expected a saved O3S search, got {path}: {error}") from error

    def plot(self, path: str | Path | None = None) -> Any:
        """The metric against each position, one panel per interior time (needs matplotlib).

        Returns the figure; `path` also writes it.
        """
        from matplotlib.figure import Figure

        positions = range(1, self.nfe)
        figure = Figure(figsize=(3.2 * max(len(positions), 1), 3.0), layout="constrained")
        best = self.best
        for position in positions:
            axes = figure.add_subplot(1, len(positions), position)
            tried = [e for e in self.evaluations if e.position == position]
            sweeps = [e.sweep or 0 for e in tried]
            axes.scatter(
                [e.grid[position] for e in tried], [e.value for e in tried], c=sweeps, s=18
            )
            axes.axhline(self.evaluations[0].value, color="0.6", lw=1, ls="--", label="start")
            axes.plot(best.grid[position], best.value, "*", ms=13, color="C3", label="best")
            axes.set_xlabel(f"$t_{position}$")
            if position == 1:
                axes.set_ylabel(
                    "metric, " + ("higher" if self.higher_is_better else "lower") + " is better"
                )
                axes.legend(fontsize=8)
        if path is not None:
            with replacing(Path(path)) as temporary:
                figure.savefig(temporary, dpi=120, format=Path(path).suffix.lstrip(".") or "png")
        return figure


def search(
    metric: Metric,
    nfe: int,
    *,
    higher_is_better: bool,
    start: str | Tensor | Sequence[float] = "uniform",
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

    Args:
        metric: Called with a float32 CPU grid `(nfe + 1,)`; a NaN counts as worst. It should give
            equal grids equal values: use one noise for all (`on_samples` does).
        nfe: Steps; nfe = 1 has nothing to search and evaluates the start only.
        higher_is_better: The metric's direction.
        start: First grid, a name or times.
        tolerance: A position's search ends when its bracket is this narrow.
        min_gap: Least distance of neighbouring times.
        min_gain: A position's search was in vain unless it gained more than this. Where positions
            interact, tiny gains otherwise keep the sweeps going.
        budget: At most this many paid evaluations, those of `resume` included.
        max_sweeps: At most this many sweeps over the positions.
        resume: Continue this search; its settings must be the same.
        save_to: Write the result there after every paid evaluation.
        callback: Called with each paid evaluation and the result so far.

    Raises:
        ValueError: bad arguments, or `resume` from a search with other settings.
    """
    checks.positive_int("nfe", nfe)
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
        nfe, higher_is_better, tuple(first.tolist()), tolerance, min_gap, min_gain
    )
    if resume is not None:
        given = replace(resume, evaluations=[], stopped="running")
        if given != result:
            raise ValueError(
                f"resume: expected a search with the settings of {result}, got {given}"
            )
        result.evaluations = list(resume.evaluations)
    run = _Search(metric, result, budget, save_to, callback)
    with contextlib.suppress(_BudgetSpent):
        run(max_sweeps)
    if save_to is not None:
        result.save(save_to)
    return result


class _BudgetSpent(Exception):
    pass


class _Search:
    def __init__(
        self,
        metric: Metric,
        result: SearchResult,
        budget: int | None,
        save_to: str | Path | None,
        callback: Callable[[Evaluation, SearchResult], None] | None,
    ) -> None:
        self.metric, self.result, self.budget = metric, result, budget
        self.save_to, self.callback = save_to, callback
        self.known = {e.grid: e.value for e in result.evaluations}
        self.cost = _ascending(result.higher_is_better)
        self.sweep: int | None = None
        self.position: int | None = None

    def __call__(self, max_sweeps: int | None) -> None:
        nfe = self.result.nfe
        grid = self.result.start
        best = self.evaluate(grid)
        in_vain, sweep = 0, 0
        while nfe > 1 and in_vain < nfe:
            if sweep == max_sweeps:
                self.result.stopped = "sweeps"
                return
            for position in range(nfe - 1, 0, -1):
                self.sweep, self.position = sweep, position
                found, cost = self.ternary(grid, position)
                in_vain = 0 if cost < best - self.result.min_gain else in_vain + 1
                if cost < best:
                    grid, best = found, cost
                if in_vain == nfe:
                    break
            sweep += 1
        self.result.stopped = "converged"

    def ternary(self, grid: tuple[float, ...], position: int) -> tuple[tuple[float, ...], float]:
        """The best grid with `position` moved between its neighbours, and its cost."""
        low = grid[position - 1] + self.result.min_gap
        high = grid[position + 1] - self.result.min_gap
        tried = {grid[position]: self.evaluate(grid)}

        def at(time: float) -> float:
            time = float(torch.tensor(time, dtype=torch.float32))
            tried[time] = self.evaluate((*grid[:position], time, *grid[position + 1 :]))
            return tried[time]

        while high - low > self.result.tolerance:
            third = (high - low) / 3
            left, right = low + third, high - third
            cost_left, cost_right = at(left), at(right)
            if cost_left == cost_right:  # a plateau: stay with the best point known
                best = min(tried, key=tried.__getitem__)
                low, high = (left if best > left else low), (right if best < right else high)
            elif cost_left > cost_right:
                low = left
            else:
                high = right
        if high > low:
            at((low + high) / 2)
        time = min(tried, key=tried.__getitem__)
        return (*grid[:position], time, *grid[position + 1 :]), tried[time]

    def evaluate(self, grid: tuple[float, ...]) -> float:
        """The cost of a grid, lower is better; paid for once."""
        if grid not in self.known:
            if self.budget is not None and len(self.result.evaluations) >= self.budget:
                self.result.stopped = "budget"
                raise _BudgetSpent
            value = float(self.metric(torch.tensor(grid, dtype=torch.float32)))
            self.known[grid] = value
            evaluation = Evaluation(grid, value, self.sweep, self.position)
            self.result.evaluations.append(evaluation)
            if self.save_to is not None:
                self.result.save(self.save_to)
            if self.callback is not None:
                self.callback(evaluation, self.result)
        return self.cost(self.known[grid])


def _ascending(higher_is_better: bool) -> Callable[[float], float]:
    """Maps a metric's value to a cost, lower is better, NaN worst."""
    sign = -1.0 if higher_is_better else 1.0
    return lambda value: math.inf if math.isnan(value) else sign * value


def on_samples(
    model: VelocityModel | GraphSampler,
    noise: Tensor,
    cond: Any,
    metric: Callable[[Tensor], float],
    *,
    guidance: Tensor | float | None = None,
) -> Metric:
    """A metric of grids from a metric of samples `(B, N, C)`: the same noise for every grid.

    With a `GraphSampler` all grids are replays of one graph.
    """
    if isinstance(model, GraphSampler):
        solve = model.sample
        return lambda grid: metric(solve(noise, cond, grid, guidance=guidance))
    return lambda grid: metric(sample(model, noise, cond, grid, guidance=guidance))
