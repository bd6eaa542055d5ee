"""SHA-256 of what a score was computed from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from imf_kernels.models.checkpoints import HUB


def sha256(*parts: str | Path) -> str:
    """Of strings and of files' contents; that of a single file is the usual one."""
    if len(parts) == 1 and isinstance(parts[0], Path):
        with parts[0].open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    whole = [sha256(part) if isinstance(part, Path) else part for part in parts]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


def contents(weights: str) -> list[str | Path]:
    """What weights are told apart by: their files, or their name on the hub.

    Hidden files and those that Python makes beside code are none of them.
    """
    path = Path(weights)
    if not weights or weights.startswith(HUB):
        return [weights]
    if not path.is_dir():
        return [path]
    parts: list[str | Path] = []
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith((".", "__")) for part in name.parts[:-1]):
            parts += [str(name), file]
    return parts
