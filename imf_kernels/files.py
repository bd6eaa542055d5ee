"""Atomic writes: a reader sees the old file or the whole new one, never a part."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path`, on error it goes.

    Whatever permissions the writer gives it, it gets those of any new file.

    Raises:
        FileNotFoundError: no such directory.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"path: expected a file in a directory that exists, got no {path.parent}"
        )
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)  # a library may have put a file of its own there
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
