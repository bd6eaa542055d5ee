"""Where an exported file goes."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def destination(path: str | Path, suffix: str) -> Iterator[Path]:
    """A file of that name in a hidden directory beside it; it takes its place where all went well.

    Raises:
        ValueError: another suffix, or a directory of that name.
        FileNotFoundError: no such directory.
    """
    path = Path(path)
    if path.suffix != suffix or path.is_dir():
        raise ValueError(f"path: expected a file ending in {suffix}, got {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"path: expected a file in a directory that exists, got no {path.parent}"
        )
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        file = Path(folder) / path.name
        yield file
        with file.open("rb+") as written:
            os.fsync(written.fileno())
        file.replace(path)
