"""What two processes run for test_ranks.py."""

import gc
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist

from imf_kernels import o3s
from tests.models.tools import conditions, small_model


def found(folder, work):
    """A search over a tiny student's development set; `work(grid)` is done at each evaluation."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = small_model("cosyvoice3").student().eval()
    batches = []
    for seed, lengths in enumerate([[9, 4], [12], [5, 3, 7]]):
        noise = torch.randn(len(lengths), max(lengths), 12)
        cond = model.prepare(**conditions(model, lengths, seed))
        batches.append(o3s.DevBatch(noise, cond, torch.randn(noise.shape)))

    def distance(mel, want):
        work(folder)
        return (mel - want).square().mean(dim=(1, 2))

    metric = o3s.DiskCache(folder / "evaluations").wrap(
        o3s.on_batches(model, batches, distance), model=model, name="distance@random"
    )
    return o3s.search(
        metric,
        3,
        higher_is_better=False,
        method="golden",
        tolerance=0.1,
        max_sweeps=1,
        save_to=folder / "found.json",
    )


def quietly(folder):
    pass


def failing(folder):
    """On rank 1, once some evaluations are there."""
    if dist.get_rank() == 1 and len(list((folder / "evaluations").iterdir())) >= 3:
        raise ArithmeticError("no loudness")


def work(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2
    )
    with pytest.raises(RuntimeError, match="rank 1 of 2: ArithmeticError: no loudness"):
        found(folder, failing)
    assert len(list((folder / "evaluations").iterdir())) == 3
    dist.barrier()
    result = found(folder, quietly)
    result.save(folder / f"rank{rank}.json")
    again = o3s.search(
        o3s.sharded(lambda grid, own: own, [1, 2, 3]),
        3,
        higher_is_better=False,
        method="golden",
        tolerance=0.1,
        max_sweeps=1,
        resume=result if rank == 0 else None,  # rank 0's counts
    )
    assert again == result
    check_that_values_go_to_one_rank(rank)
    check_groups(rank)
    gc.collect()  # whatever holds the process group
    dist.barrier()
    dist.destroy_process_group()


def check_that_values_go_to_one_rank(rank):
    """Through pickle, which tells where they come out."""
    metric = o3s.sharded(lambda grid, own: list(map(Large, own)), [1, 2, 6], reduce=total)
    assert metric(torch.tensor([0.0, 1.0])) == 9
    assert len(Large.unpickled) == (3 if rank == 0 else 0)


class Large:
    unpickled: ClassVar[list] = []

    def __init__(self, size):
        self.size = size

    def __setstate__(self, state):
        self.size = state["size"]
        Large.unpickled.append(self.size)


def total(values):
    return sum(value.size for value in values)


def check_groups(rank):
    """A group of rank 1 alone evaluates everything there."""
    own = dist.new_group([1])
    if rank == 1:
        assert (
            o3s.sharded(lambda grid, own: own, [1, 2, 6], group=own)(torch.tensor([0.0, 1.0])) == 3
        )
        return
    with pytest.raises(ValueError, match="group: expected one with this process"):
        o3s.sharded(lambda grid, own: own, [1], group=own)
