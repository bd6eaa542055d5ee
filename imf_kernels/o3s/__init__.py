"""O3S: search of the best step positions for a fixed NFE (arXiv 2510.07979, Algorithm 1).

From the uniform grid, for i = n-1 down to 1, search t_i between its neighbours for the best metric
with the others fixed; go on in sweeps until n position searches in a row brought nothing. The
metric is the user's: any callable of a grid, higher or lower better. It may be evaluated by many
ranks (`sharded`, `on_batches`) and remembered on disk (`DiskCache`).
"""

from imf_kernels.o3s.cache import DiskCache
from imf_kernels.o3s.find_grid import find_grid
from imf_kernels.o3s.metric import Metric
from imf_kernels.o3s.result import Evaluation, SearchResult
from imf_kernels.o3s.samples import DevBatch, on_batches, on_samples
from imf_kernels.o3s.search import search
from imf_kernels.o3s.sharding import mean, sharded

__all__ = [
    "DevBatch",
    "DiskCache",
    "Evaluation",
    "Metric",
    "SearchResult",
    "find_grid",
    "mean",
    "on_batches",
    "on_samples",
    "search",
    "sharded",
]
