"""The options of the suites, their rows, and a result file that is whole after every row."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.utils import safe_dumps

from benchmarks import facts
from benchmarks.contest import Conditions, Contest, Row, why
from benchmarks.timing import Ceilings
from imf_kernels.files import replacing

SELECTIONS = ("cpu", "gpu", "full", "tiny")
HELD = pytest.StashKey["Held"]()


class Held:
    """What a session keeps between rows."""

    def __init__(self, config: pytest.Config) -> None:
        device = torch.device(config.getoption("device"))
        dtype = config.getoption("dtype") or ("bfloat16" if device.type == "cuda" else "float32")
        selection = config.getoption("selection") or ("gpu" if device.type == "cuda" else "cpu")
        self.conditions = Conditions(
            device,
            getattr(torch, dtype),
            selection,
            config.getoption("row_seconds"),
            config.getoption("rounds"),
        )
        minutes = config.getoption("minutes")
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.left_out: list[dict[str, Any]] = []
        command = ["python", "-m", "pytest", *config.invocation_params.args]
        commit = config.getoption("commit")
        self.machine = facts.facts(device, dtype, list(map(str, command)), commit)

    @functools.cached_property
    def ceilings(self) -> Ceilings:
        return Ceilings.measure(self.conditions.device, self.conditions.dtype)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("imf_kernels")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--dtype", choices=("bfloat16", "float16", "float32"))
    group.addoption("--selection", choices=SELECTIONS, help="of the rows; by default the device's")
    group.addoption("--minutes", type=float, help="rows that would begin later are left out")
    group.addoption("--row-seconds", type=float, default=4.0, help="for a row's rounds")
    group.addoption("--rounds", type=int, help="of every row, whatever they take")
    group.addoption("--commit", help="of the code; by default what git says")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[HELD] = Held(config)
    torch.backends.cudnn.allow_tf32 = False  # what is compared with is float32


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("rows")
    if marker is not None:
        rows = marker.kwargs["of"](metafunc.config.stash[HELD].conditions)
        metafunc.parametrize("row", rows, ids=label)


def label(row: Row) -> str:
    """A row in words."""
    told = {name: value for name, value in row.items() if name not in ("device", "dtype")}
    words = [str(told.pop(name)) for name in ("model", "op") if name in told]
    if "seconds" in told:
        words.append(f"{told.pop('batch', 1)} x {told.pop('seconds'):g} s")
    if "nfe" in told:
        words.append(f"NFE {told.pop('nfe')}")
    if told.pop("guidance", False):
        words.append("guided")
    for name, value in told.items():
        if isinstance(value, bool):
            words.extend([name] if value else [])
        else:
            words.append(value if isinstance(value, str) else f"{name} {value:g}")
    return ", ".join(words)


@pytest.fixture
def ceilings(request: pytest.FixtureRequest) -> Ceilings:
    return request.config.stash[HELD].ceilings


@pytest.fixture
def contest(request: pytest.FixtureRequest, row: Row, benchmark: Any) -> Iterator[Contest]:
    """The contenders of a row, whose records are added to the session's."""
    held = request.config.stash[HELD]
    suite = request.path.stem.removeprefix("test_")
    benchmark._mode = "contest"  # it makes one record only, and here copies of it make all

    def record(name: str, told: Any, seconds: list[float]) -> None:
        one = copy.copy(benchmark)
        one.name, one.fullname = f"{benchmark.name}: {name}", f"{benchmark.fullname}: {name}"
        one.group, one.params = f"{suite} | {label(row)}", None
        one.extra_info = {"suite": suite, "row": row, "contender": name, **told}
        stats = one._make_stats(iterations=1)
        for taken in seconds:
            stats.update(taken)

    def leave_out(name: str | None, said: str) -> None:
        held.left_out.append({"suite": suite, "row": row, "contender": name, "why": said})

    if held.deadline is not None and time.monotonic() > held.deadline:
        leave_out(None, f"no time left of {request.config.getoption('minutes'):g} minutes")
        pytest.skip("no time left")
    made = Contest(held.conditions, record, leave_out)
    with torch.no_grad():
        yield made
    made.close()
    if made.wrong:
        pytest.fail("; ".join(made.wrong), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: pytest.CallInfo[None]) -> Any:
    """An exception in a row is why it is not there."""
    report = yield
    if report.failed and not isinstance(call.excinfo.value, pytest.fail.Exception):
        held, row = item.config.stash[HELD], item.callspec.params["row"]
        suite = item.path.stem.removeprefix("test_")
        reason = {"contender": None, "why": why(call.excinfo.value)}
        held.left_out.append({"suite": suite, "row": row, **reason})
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """What there is is written after every row: a run that is killed keeps its rows."""
    try:
        return (yield)
    finally:
        write(item.config)


def write(config: Any) -> None:
    session, hook = config._benchmarksession, config.hook
    if session.json is None:
        return
    results = hook.pytest_benchmark_generate_json(
        config=config,
        benchmarks=session.benchmarks,
        include_data=True,
        machine_info=session.get_machine_info(),
        commit_info=hook.pytest_benchmark_generate_commit_info(config=config),
    )
    hook.pytest_benchmark_update_json(
        config=config, benchmarks=session.benchmarks, output_json=results
    )
    session.json.parent.mkdir(parents=True, exist_ok=True)
    with replacing(session.json) as temporary:
        temporary.write_text(safe_dumps(results, indent=1))


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return config.stash[HELD].machine


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    return {"id": config.stash[HELD].machine["commit"]}


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    held = config.stash[HELD]
    output_json["selection"] = held.conditions.selection
    output_json["ceilings"] = held.ceilings._asdict()
    output_json["left_out"] = held.left_out
