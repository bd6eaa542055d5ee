"""What every Triton kernel takes, compiled for cards that are not here.

    python -m benchmarks.kernels

A line per kernel and architecture: of its forms in all dtypes the most registers, stack and shared
memory, and of the 64 warps of a multiprocessor the fewest that it leaves room for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import facts
from benchmarks.simulate import CARDS, Kernel
from tests import aot


def worst(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per kernel and architecture."""
    cards = {f"sm_{card.architecture}": card for card in CARDS.values()}
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for record in records:
        name, architecture = record["kernel"].strip("_"), record["architecture"]
        kernel = Kernel(name, 1, record["warps"], record["reg"], record["shared"])
        resident = record["warps"] * kernel.resident(cards[architecture])
        where = record["op"], name, architecture
        row = found.setdefault(where, dict(zip(KEYS, (*where, 0, 0, 0, 0, 64), strict=True)))
        row["forms"] += 1
        row["warps"] = min(row["warps"], resident)
        for key, given in (("registers", "reg"), ("stack", "stack"), ("shared", "shared")):
            row[key] = max(row[key], record[given])
    return [found[key] for key in sorted(found)]


KEYS = "op", "kernel", "architecture", "forms", "registers", "stack", "shared", "warps"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    args = parser.parse_args()
    rows = worst(aot.compile_all())
    print(f"{'op':<22}{'kernel':<28}{'':<8}" + "".join(f"{key:>11}" for key in KEYS[3:]))
    for row in rows:
        op, kernel, architecture, *numbers = row.values()
        cells = "".join(f"{number:>11}" for number in numbers)
        print(f"{op:<22}{kernel:<28}{architecture:<8}{cells}")
    facts.write(args.out, {"versions": facts.versions("triton"), "kernels": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
