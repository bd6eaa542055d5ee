"""A file that `--benchmark-json` wrote, and the gate: what of it may be shown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROLES = ("ours", "baseline", "peer")


@dataclass(frozen=True)
class Record:
    """One contender of one row.

    Attributes:
        group: Names the row within its file, "rtf | f5_base, 1 x 10 s, NFE 3".
        test: What was measured, of a suite's test functions: "rtf", "ops", "rollout", ...
        row: What the row states: model, dtype, NFE, ...
        contender: Names the record within its row.
        role: One of `ROLES`.
        seconds: Of every round, `(rounds,)`; contenders took turns in them.
        error, bound: Of the correctness gate; None if it was not checked.
        more: All of `extra_info`, with what was derived or counted.
    """

    group: str
    test: str
    row: Mapping[str, Any]
    contender: str
    role: str
    seconds: np.ndarray
    error: float | None
    bound: float | None
    more: Mapping[str, Any]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def right(self) -> bool:
        """Whether it passed the gate; an error that is unknown or NaN does not."""
        return None not in (self.error, self.bound) and self.error <= self.bound


class Missing(NamedTuple):
    """A contender of a row that is not shown, or None for the row itself, and why."""

    row: str
    contender: str | None
    why: str


class Row(NamedTuple):
    """Contenders that passed the gate, the baseline among them."""

    test: str
    stated: Mapping[str, Any]
    records: tuple[Record, ...]
    baseline: Record


@dataclass(frozen=True)
class Run:
    """A result file: where it comes from, its records, and what its own run left out.

    Attributes:
        device: The GPU's name, or the CPU's.
        ceilings: "flops" and "bandwidth" that the device reached, each a second.
    """

    path: Path
    device: str
    machine: Mapping[str, Any]
    ceilings: Mapping[str, float] | None
    commit: str
    date: str
    records: tuple[Record, ...]
    left_out: tuple[Missing, ...]

    def rows(self) -> tuple[list[Row], list[Missing]]:
        """The rows that may be shown, in the file's order, and all that may not.

        A contender that failed the gate is not shown; nor is a row that then has no baseline,
        several, or nothing of ours.
        """
        groups: dict[str, list[Record]] = {}
        for record in self.records:
            groups.setdefault(record.group, []).append(record)
        rows, missing = [], list(self.left_out)
        for group, records in groups.items():
            missing += [Missing(group, r.contender, _failure(r)) for r in records if not r.right]
            passed = tuple(record for record in records if record.right)
            baselines = [record for record in passed if record.role == "baseline"]
            if len(baselines) != 1:
                found = f"{len(baselines)} baselines" if baselines else "no baseline"
                missing.append(Missing(group, None, f"{found} that passed the gate"))
            elif all(record.role != "ours" for record in passed):
                missing.append(Missing(group, None, "nothing of ours that passed the gate"))
            else:
                rows.append(Row(records[0].test, records[0].row, passed, baselines[0]))
        return rows, missing


def load(path: Path) -> Run:
    """Read a result file.

    Raises:
        ValueError: it is none, with the place in it, what was expected there and what was found.
    """
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    machine = _get(found, "machine_info", dict, path)
    commit = _get(found, "commit_info", dict, path)
    records = tuple(
        _record(each, f"{path}: benchmarks[{i}]")
        for i, each in enumerate(_get(found, "benchmarks", list, path))
    )
    seen = set()
    for record in records:
        if (record.group, record.contender) in seen:
            raise ValueError(
                f"{path}: expected each contender once a row, "
                f"got '{record.group}: {record.contender}' twice"
            )
        seen.add((record.group, record.contender))
    device = _get(machine, "device", str, f"{path}: machine_info")
    return Run(
        path=path,
        device=str(machine.get("cpu", device)) if device == "CPU" else device,
        machine=machine,
        ceilings=found.get("ceilings"),
        commit=_short(str(commit.get("id") or "unknown"), bool(commit.get("dirty"))),
        date=str(found.get("datetime", "unknown"))[:10],
        records=records,
        left_out=tuple(_left_out(each, path) for each in found.get("left_out", [])),
    )


def is_result(path: Path) -> bool:
    """Whether a JSON file says that it is one of the suites': other scripts write there as well."""
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        return True  # `load` says what is wrong with it
    return isinstance(found, dict) and "benchmarks" in found


NAMES = ("model", "op", "dtype")
"""Keys of a row whose values speak for themselves."""


def said(row: Mapping[str, Any], leave: Iterable[str] = ()) -> str:
    """What a row states, in words: "f5_base, nfe 3, guidance"; its device is the whole file's."""
    words = []
    for key, value in row.items():
        if key in ("device", *leave) or value is None or value is False or isinstance(value, list):
            continue
        number = isinstance(value, float)
        told = key if value is True else f"{key} {value:g}" if number else f"{key} {value}"
        words.append(str(value) if key in NAMES else told.replace("_", " "))
    return ", ".join(words)


def _record(found: Any, where: str) -> Record:
    extra = _get(found, "extra_info", dict, where)
    inside = f"{where}.extra_info"
    seconds = _get(_get(found, "stats", dict, where), "data", list, f"{where}.stats")
    numbers = all(isinstance(value, int | float) and 0 < value < np.inf for value in seconds)
    if not seconds or not numbers:
        raise ValueError(f"{where}.stats.data: expected seconds of every round, got {seconds!r}")
    role = _get(extra, "role", str, inside)
    if role not in ROLES:
        raise ValueError(f"{inside}.role: expected one of {', '.join(ROLES)}, got {role!r}")
    for key in ("error", "bound"):
        if not isinstance(extra.get(key), int | float | None):
            raise ValueError(f"{inside}.{key}: expected a number or nothing, got {extra[key]!r}")
    return Record(
        group=_get(found, "group", str, where),
        test=_get(found, "name", str, where).partition("[")[0].removeprefix("test_"),
        row=_get(extra, "row", dict, inside),
        contender=_get(extra, "contender", str, inside),
        role=role,
        seconds=np.array(seconds, dtype=np.float64),
        error=extra.get("error"),
        bound=extra.get("bound"),
        more=extra,
    )


def _short(commit: str, dirty: bool) -> str:
    return commit[:12] + "-dirty" * (dirty or commit.endswith("-dirty"))


def _left_out(found: Any, path: Path) -> Missing:
    row = _get(found, "row", (dict, str), f"{path}: left_out")
    name = said(row) if isinstance(row, dict) else row
    if found.get("suite"):
        name = f"{found['suite']} | {name}"
    return Missing(name, found.get("contender"), _get(found, "why", str, f"{path}: left_out"))


def _get(found: Any, key: str, kind: type | tuple[type, ...], where: Any) -> Any:
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected an object with {key!r}, got {type(found).__name__}")
    if key not in found:
        raise ValueError(
            f"{where}: expected {key!r}, got {', '.join(map(str, found)) or 'nothing'}"
        )
    if not isinstance(found[key], kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(each.__name__ for each in kinds)
        raise ValueError(f"{where}: {key}: expected {wanted}, got {type(found[key]).__name__}")
    return found[key]


def _failure(record: Record) -> str:
    if None in (record.error, record.bound):
        return "its error was not checked"
    return f"error {record.error:.1e}, allowed {record.bound:.1e}"
