"""O3S: what it costs to try grids.

test_search     a whole search of so many evaluations, each a solve of a development batch, from a
                model that has answered nothing yet: its captures are inside, and told. An error is
                that of the best value found, relative
test_grid       one solve on another grid than the solve before it had

    ours, graph     one graph for all grids (GraphSampler)
    ours, eager     sampler.sample
    plain           plain PyTorch, eagerly
    recaptured      plain PyTorch, every grid's solve captured anew, as a grid of constants asks for
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.contest import Conditions, Contest, Row, Unavailable
from benchmarks.plain import plain, plainly
from benchmarks.timing import Run, graphed
from benchmarks.workload import PROMPT_SECONDS, build, error, request
from imf_kernels import grids, o3s, sampler
from imf_kernels.graphs import GraphSampler

Solve = Callable[[Tensor], Tensor]
"""Of a grid."""
ONE_GRID = "ours, graph, one grid"
"""What a graph takes whose grid stays."""
ROLES = {"ours, graph": "ours", "ours, eager": "ours", "plain": "baseline", "recaptured": "peer"}


def rows(conditions: Conditions, **told: Any) -> list[Row]:
    def row(model: str, nfe: int, seconds: float, batch: int = 1, **more: Any) -> Row:
        shape = {"model": model, "nfe": nfe, "batch": batch, "seconds": seconds}
        return conditions.row(**shape, **({"prompt": PROMPT_SECONDS} | more | told))

    if conditions.tiny:
        return [row("tiny", 2, 0.2, 2, prompt=0.1)]
    if conditions.selection == "cpu":
        return [row("f5_base", 3, 1.0, depth=2, prompt=0.5)]
    if conditions.selection == "gpu":
        return [row("f5_base", 3, 3.0, 4)]
    return [row(model, nfe, 3.0, 4) for model in ("f5_base", "cosyvoice3") for nfe in (2, 3, 4)]


def search_rows(conditions: Conditions) -> list[Row]:
    return rows(conditions, budget={"tiny": 3, "cpu": 12}.get(conditions.selection, 24))


class Solvers:
    """The ways to solve one request on any grid."""

    def __init__(self, contest: Contest, row: Row) -> None:
        self.conditions, self.nfe = contest.conditions, row["nfe"]
        model, rate = build(
            row["model"], contest.device, contest.conditions.dtype, row.get("depth")
        )
        self.model, self.twin = model, plain(model, masked=False)
        prompt = round(row["prompt"] * rate)
        frames = prompt + round(row["seconds"] * rate)
        self.noise, given = request(model, row["batch"], frames, prompt)
        self.cond = model.prepare(**given)
        self.captures = 0
        """Of the last solver."""

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Solve]:
        """A solver that has answered nothing yet."""
        self.captures = 0
        if name in ("ours, graph", ONE_GRID, "recaptured") and not (
            self.conditions.cuda or self.conditions.tiny
        ):
            raise Unavailable("a CUDA graph needs CUDA")
        if name in ("ours, graph", ONE_GRID):
            with GraphSampler(self.model, self.nfe) as found:
                yield functools.partial(found.sample, self.noise, self.cond)
                self.captures = found.stats().captures
        elif name == "ours, eager":
            yield functools.partial(sampler.sample, self.model, self.noise, self.cond)
        elif name == "plain":
            yield plainly(functools.partial(sampler.sample, self.twin, self.noise, self.cond))
        else:
            yield plainly(self._captured)

    def _captured(self, grid: Tensor) -> Tensor:
        self.captures += 1
        times = grid.to(self.noise.device)
        run = functools.partial(sampler.sample, self.twin, self.noise, self.cond, times)
        return graphed(run, self.noise.device, warm_ups=1)()


@pytest.mark.rows(of=search_rows)
def test_search(row: Row, contest: Contest) -> None:
    solvers, nfe = Solvers(contest, row), row["nfe"]
    with solvers.open("plain") as solve:
        reference = solve(grids.sway(4 * nfe))

    def search(name: str) -> o3s.SearchResult:
        with solvers.open(name) as solve:

            def metric(grid: Tensor) -> float:
                return float((solve(grid) - reference).square().mean())

            return o3s.search(metric, nfe, higher_is_better=False, budget=row["budget"])

    truth = search("plain").value
    bound = 1e-3 if contest.conditions.dtype == torch.float32 else 0.1
    for name, role in ROLES.items():

        def gate(found: o3s.SearchResult) -> tuple[float, float]:
            return abs(found.value / truth - 1), bound

        contest.enter(name, lambda name=name: functools.partial(search, name), gate, role=role)
        contest.tell(name, evaluations=row["budget"], captures=solvers.captures)
    contest.time()


@pytest.mark.rows(of=rows)
def test_grid(row: Row, contest: Contest) -> None:
    solvers, nfe = Solvers(contest, row), row["nfe"]
    turns = grids.uniform(nfe), grids.sway(nfe)
    with solvers.open("plain") as solve:
        truth = solve(turns[0])
    bound = 1e-4 if contest.conditions.dtype == torch.float32 else 0.05
    with contextlib.ExitStack() as stack:
        for name, role in {**ROLES, ONE_GRID: "peer"}.items():

            def turning(name: str = name) -> Run:
                solve = stack.enter_context(solvers.open(name))
                turn = itertools.cycle(turns[:1] if name == ONE_GRID else turns)
                return lambda: solve(next(turn))

            def gate(mel: Tensor) -> tuple[float, float]:  # of the first call
                return error(mel - solvers.noise, truth - solvers.noise), bound

            contest.enter(name, turning, gate, role=role)
        contest.time()
