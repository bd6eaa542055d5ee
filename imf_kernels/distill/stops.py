"""How a run ends before its time: by a signal, or because a rank has failed."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from imf_kernels.distill.parallel import from_all
from imf_kernels.files import replacing

PATIENCE = 10.0
"""Seconds to look for another rank's last words, once it is gone."""
IMPATIENCE = 1.0
"""Seconds after which a further SIGINT is meant."""
BROKEN = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "ProcessGroup",
    "NCCL error",
    "NCCL communicator",
)
"""Of a RuntimeError that is a collective's; gloo has no type of its own."""


class Stopped(Exception):
    """A signal has ended the run, in order: `update` is saved in `path`, where it will go on.

    `status` is the process's to exit with, as a shell has it: 143 for SIGTERM, 130 for SIGINT.
    """

    def __init__(self, update: int, path: Path, name: str) -> None:
        super().__init__(f"{name}: stopped after update {update}, saved in {path}")
        self.update, self.path = update, path
        known = signal.Signals.__members__
        self.status = 128 + int(known.get(name, signal.SIGTERM))


class RankFailed(SystemExit):
    """Another rank has failed: the process ends with one line that says which and why."""

    def __init__(self, rank: int, error: str) -> None:
        super().__init__(f"rank {rank} failed: {error}")
        self.rank = rank


class Signals:
    """Within, the first SIGTERM or SIGINT is noted in `asked`, and what follows changes nothing:
    the end of a job is often told twice, by the scheduler and by the launcher. A SIGINT a second
    later is somebody who does not want to wait: it acts as usual.

    Only the main thread can ask for signals: in another they act as usual.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.asked is None:
            self.asked, self._since = signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self._since >= IMPATIENCE:
            self.__exit__()
            signal.raise_signal(number)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What all ranks do in one step: if it fails on one, it has failed on all, after all are done.

    Raises:
        RankFailed: on the others.
    """
    error = None
    try:
        yield
    except Exception as mine:
        error = mine
    told = from_all(None if error is None else _text(error))
    if error is not None:
        raise error
    for rank, text in enumerate(told):
        if text is not None:
            raise RankFailed(rank, text)


@contextlib.contextmanager
def last_words(folder: Path, rank: int, ranks: int) -> Iterator[None]:
    """Let a run of several ranks end with one error: the first that is not another's consequence.

    The rank that it happens to writes `failed_rank<k>.json`. The others notice by a collective that
    breaks, read that file, and end with `RankFailed` in place of the collective's trace.
    """
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        if ranks == 1:
            raise
        if _broken(error):
            said = _wait_for_words(folder, rank)
            if said is not None:
                raise RankFailed(said["rank"], said["error"]) from error
            lost = "a rank has gone without a word: killed, out of memory, or out of reach"
            raise ConnectionError(f"{lost} ({_text(error)})") from error
        with contextlib.suppress(OSError), replacing(words(folder, rank)) as temporary:
            temporary.write_text(json.dumps({"rank": rank, "error": _text(error)}))
        raise


def words(folder: Path, rank: int) -> Path:
    """Where a rank says why it failed."""
    return folder / f"failed_rank{rank}.json"


def forget(folder: Path) -> None:
    """Remove what an earlier run's ranks have said."""
    for path in folder.glob("failed_rank*.json"):
        path.unlink()


def _wait_for_words(folder: Path, rank: int) -> dict[str, Any] | None:
    deadline = time.monotonic() + PATIENCE
    while True:
        for path in sorted(folder.glob("failed_rank*.json")):
            if path != words(folder, rank):
                return json.loads(path.read_text())
        if time.monotonic() > deadline:
            return None
        time.sleep(0.1)


def _broken(error: Exception) -> bool:
    """Whether an error may be a collective's."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in BROKEN)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
