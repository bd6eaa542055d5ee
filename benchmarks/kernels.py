"""Registers, stack and shared memory of every Triton kernel, compiled for cards that are not here.

    python -m benchmarks.kernels

A line per kernel and architecture: the most that any of its forms takes.
"""

from __future__ import annotations

from collections import defaultdict

from tests import aot


def main() -> None:
    worst: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for record in aot.compile_all():
        entry = worst[record["op"], record["kernel"].strip("_"), record["architecture"]]
        entry[0] += 1
        for i, name in enumerate(("reg", "stack", "shared"), start=1):
            entry[i] = max(entry[i], record[name])
    print(f"{'op':<22}{'kernel':<28}{'':<8}{'forms':>6}{'registers':>11}{'stack':>7}{'shared':>9}")
    for (op, kernel, architecture), (forms, registers, stack, shared) in sorted(worst.items()):
        print(
            f"{op:<22}{kernel:<28}{architecture:<8}{forms:>6}{registers:>11}{stack:>7}{shared:>9}"
        )


if __name__ == "__main__":
    main()
