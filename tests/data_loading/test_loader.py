"""Batches by position: resumed, shared among ranks, made by workers, they are the same."""

import multiprocessing
import os
import signal
from itertools import islice

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from imf_kernels import Batch
from imf_kernels.data import Loader
from tests.data_loading.made import Made

LENGTHS = [3, 9, 4, 4, 7, 12, 5, 3, 8, 6, 6, 11, 10]


def drawn(utterances, generator):
    """A batch with draws in it."""
    mels = [one.mel for one in utterances]
    x1 = pad_sequence(mels, batch_first=True)
    noise = torch.randn(x1.shape, generator=generator)
    lengths = torch.tensor([len(mel) for mel in mels])
    names = tuple(one.name for one in utterances)
    return Batch(x1 + noise, lengths, {"prompt": noise, "streaming": True}, names=names)


def loader(**options):
    return Loader(Made(LENGTHS), drawn, **({"frames": 24, "seed": 5} | options))


def taken(batches, number):
    return [(batch.names, batch.x1.tolist()) for batch in islice(batches, number)]


@pytest.mark.parametrize("rank", [0, 1])
def test_resuming_at_any_position(rank):
    made = loader(rank=rank, ranks=2)
    whole = taken(made(0), 3 * len(made) + 1)
    for start in range(2 * len(made) + 2):
        rest = taken(loader(rank=rank, ranks=2)(start), len(made))
        assert rest == whole[start : start + len(made)]


def test_ranks_share_an_epoch():
    ranks = [taken(loader(rank=rank, ranks=2)(0), len(loader(ranks=2))) for rank in range(2)]
    names = [name for rank in ranks for batch, _ in rank for name in batch]
    assert len(names) == len(set(names))
    assert len(ranks[0]) == len(ranks[1])
    alone = [name for batch, _ in taken(loader()(0), len(loader())) for name in batch]
    assert sorted(alone) == sorted(Made(LENGTHS).names)


def test_draws_are_of_rank_position_and_seed():
    """Also where the utterances are the same."""
    one = {"frames": sum(LENGTHS) * 5, "max_rows": None}
    first, second = islice(loader(**one)(0), 2)
    other = next(loader(**one, seed=6)(0))
    assert set(first.names) == set(second.names) == set(other.names) == set(Made(LENGTHS).names)
    noises = [batch.conditions["prompt"] for batch in (first, second, other)]
    assert not any(torch.equal(a, b) for a, b in zip(noises, noises[1:] + noises[:1], strict=True))


def test_workers_change_nothing_and_outlive_a_signal_to_all():
    made = loader()
    number = 2 * len(made) + 3
    others = set(multiprocessing.active_children())
    batches = loader(workers=2)(1)
    got = taken(batches, 2)  # one of each: so both have begun
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == 2
    for worker in workers:  # as a cluster manager does; but none comes from a worker's parent
        os.system(f"kill -{signal.SIGTERM} {worker.pid}")
    got += taken(batches, number - 2)
    assert got == taken(made(1), number)
    batches.close()
    for worker in workers:
        worker.join(20)
        assert worker.exitcode == 0


def test_finish_is_called_in_the_end_and_nothing_else_is_drawn():
    def finish(batch):
        return Batch(batch.x1 * 0, batch.lengths, batch.conditions, names=batch.names)

    state = torch.get_rng_state()
    got = next(loader(finish=finish)(4))
    assert torch.equal(torch.get_rng_state(), state), "torch's own random state is the trainer's"
    assert got.names == next(loader()(4)).names
    assert not got.x1.any()
    assert got.conditions["streaming"] is True


@pytest.mark.gpu
def test_on_the_device():
    got = [next(loader(device="cuda", workers=workers)(2)) for workers in (0, 1)]
    want = next(loader()(2))
    for batch in got:
        assert batch.x1.device.type == "cuda"
        assert torch.equal(batch.x1.cpu(), want.x1)
        assert torch.equal(batch.conditions["prompt"].cpu(), want.conditions["prompt"])


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_read_is_an_error(workers):
    class Broken(Made):
        def __getitem__(self, index):
            raise ValueError(f"made_{index}: expected audio")

    made = Loader(Broken([3]), drawn, frames=9, workers=workers)
    with pytest.raises(ValueError, match="made_0: expected audio") as caught:
        next(made(0))
    said = " ".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert "put 'made_0' into the document's data.exclude" in said


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 2, "ranks": 2}, r"rank: expected an integer in \[0, 1\], got 2"),
        ({"workers": -1}, "workers: expected an integer >= 0, got -1"),
        ({"frames": 11}, "frames: expected no fewer .* the longest made_5 of 12"),
    ],
)
def test_errors(changed, message):
    with pytest.raises(ValueError, match=message):
        loader(**changed)


def test_start_is_a_position():
    with pytest.raises(ValueError, match="start: expected an integer >= 0, got -1"):
        loader()(-1)
