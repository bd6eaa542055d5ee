"""What a committed figure was drawn from, as a hash that stands in its metadata."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(*paths: str | Path) -> str:
    """Of a figure's script and of what it reads."""
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()
