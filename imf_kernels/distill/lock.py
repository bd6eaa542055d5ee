"""One run at a time in a folder."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path


class Locked(RuntimeError):
    """Another process is at work in the folder."""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within, `folder/lock` is this process's; it goes with it, however it ends.

    The lock is the process's own, and no worker's that it forks: those may outlive it for a while.
    Where the system has no such locks (Windows) there is none.

    Raises:
        Locked: naming who holds it.
        OSError: the folder cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # which of them is the system's choice
            file.seek(0)
            raise Locked(
                f"folder: expected one that no other run is in, got {folder}, where "
                f"{file.read().strip() or 'another process'} trains"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
