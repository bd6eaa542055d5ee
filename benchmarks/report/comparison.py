"""Two result files of one device against each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.report.ratios import Ratio, ratio
from benchmarks.report.results import Record, Run
from benchmarks.report.tables import quantity, significant, table

THRESHOLD = 0.02

CAVEAT = (
    "The intervals are 95 % bootstrap intervals over the rounds of each run. They do not cover how "
    "the machine drifts between runs (clocks, temperature, neighbours): run both again, in turn, "
    "before you believe a small difference. Of a hundred equal records about five lie outside of "
    "their interval by chance."
)


class Difference(NamedTuple):
    """A record of both files: seconds, new over old, and what that means."""

    old: Record
    new: Record
    ratio: Ratio
    verdict: str


class Comparison(NamedTuple):
    """Differences in the new file's order, and the names of what has none."""

    differences: list[Difference]
    only_old: list[str]
    only_new: list[str]
    was_wrong: list[str]
    is_wrong: list[str]
    """Failed the correctness gate, in the old file and in the new one."""


def compare(old: Run, new: Run, threshold: float = THRESHOLD) -> Comparison:
    """Every record of both files: the same group and contender, right in both.

    Raises:
        ValueError: files of different devices; a row that states otherwise in both, for example its
            dtype; nothing in common.
    """
    if old.device != new.device:
        raise ValueError(
            f"{new.path}: expected the device of {old.path}, {old.device!r}, got {new.device!r}"
        )
    before, after = ({_key(record): record for record in run.records} for run in (old, new))
    if not before.keys() & after.keys():
        raise ValueError(f"{new.path}: expected records of {old.path}, got none in common")
    differences = []
    for key in after:
        if key in before:
            _check_same_row(old, new, before[key], after[key])
            if before[key].right and after[key].right:
                found = ratio(after[key].seconds, before[key].seconds, paired=False)
                differences.append(
                    Difference(before[key], after[key], found, verdict(found, threshold))
                )
    return Comparison(
        differences,
        only_old=[": ".join(key) for key in before if key not in after],
        only_new=[": ".join(key) for key in after if key not in before],
        was_wrong=[": ".join(key) for key, record in before.items() if not record.right],
        is_wrong=[": ".join(key) for key, record in after.items() if not record.right],
    )


def verdict(found: Ratio, threshold: float) -> str:
    """What a ratio means: "faster" or "slower" if 1 lies outside of the interval, and the ratio
    beyond the threshold; "same" if the whole interval lies within it; "unclear" otherwise."""
    if found.high < 1 and found.value <= 1 - threshold:
        return "faster"
    if found.low > 1 and found.value >= 1 + threshold:
        return "slower"
    if 1 - threshold <= found.low and found.high <= 1 + threshold:
        return "same"
    return "unclear"


def text(old: Run, new: Run, found: Comparison) -> str:
    """Markdown: the table, what has no line in it, and what the intervals mean."""
    rows = [
        (
            each.new.group,
            each.new.contender,
            quantity(each.old.median),
            quantity(each.new.median),
            significant(each.ratio.value),
            interval(each.ratio),
            each.verdict,
        )
        for each in found.differences
    ]
    titles = ("row", "contender", "old", "new", "new / old", "95 %", "verdict")
    counts = Counter(each.verdict for each in found.differences)
    parts = [
        f"{new.device}: {old.commit} ({old.date}) to {new.commit} ({new.date})",
        table(titles, rows),
        ", ".join(f"{counts[each]} {each}" for each in ("faster", "slower", "same", "unclear")),
        _listed("Only in the old file", found.only_old),
        _listed("Only in the new file", found.only_new),
        _listed("Wrong in the old file", found.was_wrong),
        _listed("Wrong in the new file", found.is_wrong),
        CAVEAT,
    ]
    return "\n\n".join(part for part in parts if part)


def interval(found: Ratio) -> str:
    if not found.known:
        return "too few rounds"
    return f"{significant(found.low)} to {significant(found.high)}"


def _listed(title: str, names: Sequence[str]) -> str:
    return "\n".join((f"{title}:\n", *(f"- {name}" for name in names))) if names else ""


def _key(record: Record) -> tuple[str, str]:
    return record.group, record.contender


def _check_same_row(old: Run, new: Run, before: Record, after: Record) -> None:
    for key in before.row.keys() & after.row.keys():
        if before.row[key] != after.row[key]:
            raise ValueError(
                f"{new.path}: {after.group}: {key}: expected {before.row[key]!r} as in {old.path}, "
                f"got {after.row[key]!r}"
            )
