"""An endless sequence of batches, of which any part can be had again: a pure function of positions.

Epoch, order and every draw follow from the seed, the rank and the number of batches that the rank
has taken. So one integer resumes a run.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

import torch
from torch.utils.data import DataLoader, Dataset

from imf_kernels import checks, seeds
from imf_kernels.data.budget import Budget
from imf_kernels.data.utterances import Utterance, Utterances
from imf_kernels.objectives.batch import Batch

Collate = Callable[[list[Utterance], torch.Generator], Batch]


class Loader:
    """`loader(start)` are this rank's batches from the one after `start` others on, without end.

    They do not depend on `workers`.

    Args:
        utterances: The dataset.
        collate: Makes a batch of utterances, drawing from the generator given and no other.
        frames, max_rows, packed, drop_long: What a batch may hold, see `Budget`.
        seed: Of orders and draws.
        rank, ranks: This process, and how many share each epoch.
        workers: Processes that read and collate ahead; 0: this one does, when asked.
        device: Where the batches are to be.
        finish: Called with each batch there: what is too dear for workers, such as `Encoded`.

    Raises:
        ValueError: naming the argument, the expected and the given value.
    """

    def __init__(
        self,
        utterances: Utterances,
        collate: Collate,
        *,
        frames: int,
        max_rows: int | None = None,
        packed: bool = False,
        drop_long: bool = False,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
        device: torch.device | str = "cpu",
        finish: Callable[[Batch], Batch] | None = None,
    ) -> None:
        checks.positive_int("ranks", ranks)
        checks.whole("rank", rank, 0, ranks - 1)
        checks.whole("workers", workers, 0)
        self.budget = Budget(
            utterances.frames,
            frames,
            max_rows=max_rows,
            packed=packed,
            seed=seed,
            ranks=ranks,
            drop_long=drop_long,
            names=utterances.names,
        )
        self.rank, self.workers = rank, workers
        self.device, self.finish = torch.device(device), finish
        self._batches = _Batches(utterances, collate, seed, rank)

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        return len(self.budget)

    def __call__(self, start: int = 0) -> Iterator[Batch]:
        checks.whole("start", start, 0)
        return self._from(start)

    def _from(self, start: int) -> Iterator[Batch]:
        taken = ((position, self.budget.batch(self.rank, position)) for position in count(start))
        batches = DataLoader(
            self._batches,
            sampler=taken,
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=_heed_parent,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or it draws from torch's own, for nothing
        )
        with _sigterm_blocked():  # which is inherited, by every thread
            made = iter(batches)
        for batch in made:
            batch = batch.to(self.device, non_blocking=True)
            yield batch if self.finish is None else self.finish(batch)


class _Batches(Dataset[Batch]):
    """What workers are given: batches by position and utterances."""

    def __init__(self, utterances: Utterances, collate: Collate, seed: int, rank: int) -> None:
        self.utterances, self.collate = utterances, collate
        self.seed, self.rank = seed, rank

    def __getitem__(self, taken: tuple[int, list[int]]) -> Batch:
        position, rows = taken
        generator = torch.Generator().manual_seed(seeds.seed(self.seed, self.rank, position))
        return self.collate([self._read(row) for row in rows], generator)

    def _read(self, row: int) -> Utterance:
        try:
            return self.utterances[row]
        except (OSError, ValueError) as error:
            name = self.utterances.names[row]
            error.add_note(f"To go on without it, put {name!r} into the document's data.exclude")
            raise


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Cluster managers send SIGTERM to all processes of a job at once.

    The run then saves what it has, for which its batches must not break off.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _heed_parent(worker: int) -> None:
    """A worker ends when its parent says so, with a signal that is blocked here."""
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
