"""Seeds of their own for everything that is drawn: a run then has a position, and no state."""

from __future__ import annotations

import hashlib


def seed(*numbers: int) -> int:
    """A seed that no other tuple of integers shares but by accident, in [0, 2^63)."""
    said = ",".join(str(int(number)) for number in numbers)
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "big") >> 1
