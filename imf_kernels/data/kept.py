"""What was read of files, kept in a file of its own until they change."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from imf_kernels.files import replacing

FORMAT = 1
THREADS = 16
"""That read of many files, of which most wait for disks."""


def kept(
    place: Path, names: Sequence[str], read: Callable[[list[str]], Sequence[Any]]
) -> list[Any]:
    """What `read` makes of files, in their order: of those only that `place` does not tell of.

    A file is another one by its name, its size or its time of modification. A `place` that is
    damaged is made anew; one that cannot be written is warned of, and all is well but slower.

    Args:
        place: A JSON file, which is made if need be.
        names: The files, seen from the folder of `place`.
        read: Given names in their order; what it returns of each is what JSON holds.
    """
    marks = _marks(str(place.parent), names)
    told = {name: entry for name, entry in _told(place).items() if marks.get(name) == entry[0]}
    new = [name for name in dict.fromkeys(names) if name not in told]
    if new:
        told |= {name: [marks[name], value] for name, value in zip(new, read(new), strict=True)}
        files = {name: entry for name, entry in told.items() if entry[0] is not None}
        try:
            with replacing(place) as temporary:
                temporary.write_text(json.dumps({"format": FORMAT, "files": files}))
        except OSError as error:
            warnings.warn(
                f"{place}: {error.strerror or error}: {len(new)} files will be read again at the "
                "next start",
                RuntimeWarning,
                stacklevel=3,
            )
    return [told[name][1] for name in names]


def _marks(folder: str, names: Sequence[str]) -> dict[str, list[int] | None]:
    """Threads take shares: on a near disk it costs more to hand over a file than to look at it."""

    def share(first: int) -> list[tuple[str, list[int] | None]]:
        return [(name, _mark(os.path.join(folder, name))) for name in names[first::THREADS]]

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(chain.from_iterable(pool.map(share, range(THREADS))))


def _mark(path: str) -> list[int] | None:
    """Size and time of a file; None for what `read` is to complain of."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _told(place: Path) -> dict[str, list[Any]]:
    """The mark and the value of each file; nothing of a place that is damaged."""
    try:
        held = json.loads(place.read_bytes())
        files = held["files"].items() if held["format"] == FORMAT else ()
        return {name: [mark, value] for name, (mark, value) in files if mark is not None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
