"""A row of a suite: contenders of one shape, each checked first, then all timed in turn.

A suite is a file `test_<suite>.py`. A row of it is a test, a contender of the row a record of
pytest-benchmark, whose data are the seconds of every round. So ratios within a row are of rounds of
one run. A row with a wrong contender has no record, nor has one without its baseline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
        seconds: How long the contenders of a row are timed, all together.
        rounds: How often each, whatever that takes; None: as `seconds` allow, `FEWEST` at least.
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
        return {"device": kind, "dtype": str(self.dtype).removeprefix("torch."), **told}


FEWEST, MOST = 3, 50


@dataclass
class Contender:
    run: Run
    role: str
    seconds: float
    told: dict[str, Any] = field(default_factory=dict)


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
        self.wrong: dict[str, str] = {}

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
            run()  # which may compile, capture or tune
            start = time.perf_counter()
            result = run()
            timing.synchronize(self.device)
            seconds = time.perf_counter() - start
            error, bound = gate(result)
            if not error <= bound:  # NaN is beyond it
                self.wrong[name] = f"error {error:.2e}, at most {bound:.2e} expected"
            told |= {"error": error, "bound": bound}
            self.contenders[name] = Contender(run, role, seconds, told)
        except (Unavailable, torch.OutOfMemoryError) as why:
            self.leave_out(name, str(why).splitlines()[0])
        except Exception as problem:
            if role != "peer":
                raise
            self.leave_out(name, f"{type(problem).__name__}: {str(problem).splitlines()[:1]}")

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
            share: Of the seconds that a row is timed.
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
            Failed, Skipped: pytest's, where a result is wrong, the baseline missing, or ours.
        """
        if self.wrong:
            why = "; ".join(f"{name}: {error}" for name, error in self.wrong.items())
            self.leave_out(None, f"wrong results: {why}")
            pytest.fail(f"wrong results: {why}", pytrace=False)
        for role in ("baseline", "ours"):
            if all(contender.role != role for contender in self.contenders.values()):
                self.leave_out(None, f"{role}: none could run")
                pytest.skip(f"{role}: none could run")

    def rounds(self, share: float = 1.0) -> int:
        conditions = self.conditions
        if conditions.rounds is not None:
            return conditions.rounds
        once = sum(contender.seconds for contender in self.contenders.values())
        return min(max(int(share * conditions.seconds / once), FEWEST), MOST)

    def record(self, name: str, seconds: list[float]) -> None:
        contender = self.contenders[name]
        self._record(name, {"role": contender.role, **contender.told}, seconds)

    def close(self) -> None:
        self.contenders.clear()
        facts.release()
