"""Metrics of grids for the tests, and ranks without processes."""

import threading
from dataclasses import dataclass, field

import torch

from imf_kernels.o3s.metric import Ranks


class Counted:
    """A metric that refuses to be asked twice for the same grid."""

    def __init__(self, metric):
        self.metric, self.asked = metric, []

    def __call__(self, grid):
        assert isinstance(grid, torch.Tensor)
        assert grid.dtype == torch.float32
        assert grid.device.type == "cpu"
        times = tuple(grid.tolist())
        assert times not in self.asked, "paid twice"
        self.asked.append(times)
        return self.metric(times[1:-1])


def separable(cost, optimum):
    """A sum of one convex curve per position."""
    return lambda inner: sum(cost(t - a) for t, a in zip(inner, optimum, strict=True))


def asymmetric(d):
    return 3 * d if d > 0 else -d


CURVES = {
    "quadratic": lambda d: d * d,
    "absolute": abs,
    "steep after": asymmetric,
    "steep before": lambda d: asymmetric(-d),
    "flat bottom": lambda d: max(abs(d) - 0.05, 0.0),
    "wide flat bottom": lambda d: max(abs(d) - 0.2, 0.0),
    "rounded": lambda d: round(abs(d), 1),
}


def rugged(seed):
    """A metric without any structure, the same for the same grid."""
    generator = torch.Generator().manual_seed(seed)
    waves = torch.randn(4, 8, generator=generator, dtype=torch.float64) * 20

    def metric(inner):
        t = torch.zeros(8, dtype=torch.float64)
        t[: len(inner)] = torch.tensor(inner, dtype=torch.float64)
        return float(torch.sin(waves @ t).sum())

    return metric


def rugged_on_grids(seed):
    metric = rugged(seed)
    return lambda grid: metric(grid.tolist()[1:-1])


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """Ranks that are threads of this process."""

    board: list = field(default_factory=list)
    barrier: threading.Barrier | None = None

    def gather(self, value):
        self.board[self.rank] = value
        self.barrier.wait(timeout=10)
        values = list(self.board)
        self.barrier.wait(timeout=10)
        return values

    def collect(self, value):
        return self.gather(value) if self.rank == 0 else self.gather(value)[:0]


def on_ranks(size, work):
    """What each of so many ranks makes of `work(ranks)`: a result or an exception."""
    board, barrier, made = [None] * size, threading.Barrier(size), [None] * size

    def run(rank):
        try:
            made[rank] = work(ThreadRanks(rank, size, board=board, barrier=barrier))
        except Exception as error:
            made[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made
