"""A row of a suite: contenders of one shape, each checked first, then all timed in turn.

A suite is a file `test_<suite>.py`. A row of it is a test, a contender of the row a record of
pytest-benchmark, whose data are the seconds of every round. So ratios within a row are of rounds of
one run. A wrong contender has no record, and fails its row's test; without a right baseline, and a
right contender of ours, the whole row has none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks import facts, timing
from benchmarks.timing import Clock, Run, milliseconds

Row = dict[str, Any]
"""What tells a row from others: numbers and words, as the results state it."""
Gate = Callable[[Any], tuple[float, float]]
"""Of a result: its error, and the largest that is accepted."""


class Unavailable(Exception):
    """A contender cannot run here; the message says why."""


@dataclass(frozen=True)
class Conditions:
    """Under which all rows of a run are measured.

    Attributes:
        selection: Which rows: "cpu", "gpu" (most telling first), "full" or "tiny", which takes
            every path on whatever device, in seconds.
        seconds: After which a row begins no further round.
        rounds: Of every row, whatever they take; None: as many as `seconds` allow.
    """

    device: torch.device
    dtype: torch.dtype
    selection: str
    seconds: float
    rounds: int | None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def tiny(self) -> bool:
        return self.selection == "tiny"

    def row(self, **told: Any) -> Row:
        kind = torch.cuda.get_device_name(self.device) if self.cuda else "CPU"
        row = {"device": kind, "dtype": str(self.dtype).removeprefix("torch."), **told}
        if os.environ.get("IMF_KERNELS_PDL") == "1":
            row["dependent_launch"] = True
        return row


FEWEST, MOST = 6, 50
"""Rounds of a row, enough for an interval; where they take `LONG` times its seconds, 2 must do."""
LONG = 5


@dataclass
class Contender:
    run: Run
    role: str
    told: dict[str, Any]


class Contest:
    """Enter the contenders, then `time` them.

    Args:
        record: Makes a record of a contender's name, what else is told of it, and its seconds.
        leave_out: Told a contender's name, None for the row, and why there is no record.
    """

    def __init__(
        self,
        conditions: Conditions,
        record: Callable[[str, Mapping[str, Any], list[float]], None],
        leave_out: Callable[[str | None, str], None],
    ) -> None:
        self.conditions, self.device = conditions, conditions.device
        self._record, self.leave_out = record, leave_out
        self.contenders: dict[str, Contender] = {}
        self.wrong: list[str] = []

    def enter(
        self,
        name: str,
        make: Callable[[], Run],
        gate: Gate,
        *,
        role: str = "peer",
        **told: Any,
    ) -> None:
        """A contender: `make` prepares it, a result is checked.

        Args:
            role: "ours" or "baseline", without which there is no row; or "peer", whose exceptions
                leave it out.
            told: What else its record says.
        """
        try:
            run = make()
            error, bound = gate(run())
            if not error <= bound:  # NaN is beyond it
                said = f"wrong: error {error:.2e}, at most {bound:.2e} expected"
                self.wrong.append(f"{name} is {said}")
                self.leave_out(name, said)
                return
            if self.conditions.cuda:
                run()  # the first may have compiled, captured or tuned
            told |= {"error": error, "bound": bound}
            self.contenders[name] = Contender(run, role, told)
        except Unavailable as reason:
            self.leave_out(name, str(reason))
        except torch.OutOfMemoryError:
            self.leave_out(name, "does not fit into the device's memory")
        except Exception as problem:
            if role != "peer":
                raise
            self.leave_out(name, why(problem))

    def tell(self, name: str, **told: Any) -> None:
        """More about a contender that takes part."""
        if name in self.contenders:
            self.contenders[name].told |= told

    def time(
        self, clock: Clock | None = milliseconds, *, calls: int = 1, share: float = 1.0
    ) -> None:
        """Time all in turn, and make their records.

        Args:
            clock: None: of the device alone (`timing.turns_on_device`), where the L2 is cold.
            calls: How many calls, each like the other, a run makes.
            share: Of a row's seconds.
        """
        self.settle()
        runs = {name: contender.run for name, contender in self.contenders.items()}
        rounds = self.rounds(share)
        if clock is None:
            taken = timing.turns_on_device(runs, self.device, rounds)
        else:
            taken = timing.turns(runs, self.device, rounds, clock)
        for name, ms in taken.items():
            self.record(name, [value / 1e3 / calls for value in ms])

    def settle(self) -> None:
        """Whether there is a row.

        Raises:
            Skipped: pytest's, where the baseline is missing, or ours.
        """
        for role in ("baseline", "ours"):
            if all(contender.role != role for contender in self.contenders.values()):
                self.leave_out(None, f"no contender is {role}")
                pytest.skip(f"no contender is {role}")

    def rounds(self, share: float = 1.0) -> Iterator[int]:
        """Counts rounds for as long as a row may go on."""
        conditions, start = self.conditions, time.monotonic()
        most = MOST if conditions.rounds is None else conditions.rounds
        for count in range(most):
            if conditions.rounds is None:
                taken = (time.monotonic() - start) / (share * conditions.seconds)
                if (taken > 1 and count >= FEWEST) or (taken > LONG and count >= 2):
                    return
            yield count

    def record(self, name: str, seconds: list[float]) -> None:
        contender = self.contenders[name]
        self._record(name, {"role": contender.role, **contender.told}, seconds)

    def close(self) -> None:
        self.contenders.clear()
        facts.release()


def why(problem: BaseException) -> str:
    """In one line."""
    return f"{type(problem).__name__}: {problem}".splitlines()[0]
