"""The bookkeeping of a slot on a pretended CUDA: what is taken is given back, in order."""

import contextlib
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from imf_kernels import backends, dispatch
from imf_kernels.graphs import runtime
from imf_kernels.ops.ragged_copy import Copy

POOL = (0, 7)


class Calls(list):
    """What was asked of CUDA; `held` counts the references to the pool."""

    broken = False

    @property
    def held(self):
        taken = self.count("route") + self.count("begin")
        return taken - self.count("release") - self.count("reset")


@pytest.fixture
def calls(monkeypatch):
    calls = Calls()

    class Graph:
        ended = False

        def capture_begin(self, pool, capture_error_mode):
            assert (pool, capture_error_mode) == (POOL, "thread_local")
            calls.append("begin")

        def capture_end(self):
            calls.append("end")
            if calls.broken:
                raise RuntimeError("operation failed due to a previous error during capture")
            self.ended = True

        def replay(self):
            calls.append("replay")

        def __del__(self):
            if self.ended:
                calls.append("reset")

    def noted(name):
        def call(device, pool):
            assert (device, pool) == (0, POOL)
            calls.append(name)

        return call

    def nothing(*_):
        return contextlib.nullcontext()

    cuda = {
        "Stream": MagicMock(),
        "current_stream": MagicMock(),
        "graph_pool_handle": lambda: POOL,
        "device": nothing,
        "stream": nothing,
        "CUDAGraph": Graph,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name, called in (
        ("_cuda_beginAllocateCurrentThreadToPool", "route"),
        ("_cuda_endAllocateToPool", "unroute"),
        ("_cuda_releasePool", "release"),
    ):
        monkeypatch.setattr(torch._C, name, noted(called), raising=False)
    monkeypatch.setattr(torch, "__version__", "2.12.1")
    monkeypatch.setattr(dispatch, "HAS_CUDA_EXTENSION", False)
    monkeypatch.setattr(runtime, "_ABORTED", [])
    return calls


@pytest.fixture
def slot(calls):
    return runtime.slot_on(torch.device("cuda", 0))


def test_a_capture_warms_up_in_the_pool_and_runs_once_more(slot, calls):
    slot.capture(lambda: calls.append("run"))
    warm_ups = ["run"] * runtime.WARM_UPS
    assert calls == ["route", *warm_ups, "unroute", "begin", "run", "end"]


def test_a_replay_copies_in_launches_in_turn_and_copies_out(slot, calls):
    static, out = torch.zeros(3), torch.zeros(2)
    graphs = [slot.capture(lambda: None) for _ in range(2)]
    calls.clear()
    slot.replay([Copy(static, torch.ones(2), 5.0)], graphs, [Copy(out, static)])
    assert calls == ["replay", "replay"]
    assert static.tolist() == [1.0, 1.0, 5.0]
    assert out.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("broken", [False, True])
def test_a_failed_capture_gives_back_what_it_took(slot, calls, broken):
    graph = slot.capture(lambda: None)
    held = calls.held
    runs = []

    def fails():
        runs.append(None)
        if len(runs) > runtime.WARM_UPS:
            calls.broken = broken
            raise ValueError("the model's own")

    with pytest.raises(ValueError, match="the model's own"):
        slot.capture(fails)
    calls.broken = False
    assert calls.held == held
    assert calls.count("route") + broken == calls.count("unroute")
    assert len(runtime._ABORTED) == broken, "its filter may still be asked"
    slot.replay([], [graph, slot.capture(lambda: None)], [])


def test_a_failed_warm_up_leaves_nothing(slot, calls):
    def fails():
        raise ValueError("out of memory")

    with pytest.raises(ValueError, match="out of memory"):
        slot.capture(fails)
    slot.close()
    assert calls.held == 0
    assert calls.count("route") == calls.count("unroute")


def test_closing_gives_up_the_pool(slot, calls):
    graphs = [slot.capture(lambda: None) for _ in range(3)]
    assert calls.held == 4, "each graph, and the slot itself"
    graphs.clear()
    slot.close()
    assert calls.held == 0


@pytest.mark.parametrize("native", [False, True])
class TestFixed:
    @pytest.fixture(autouse=True)
    def path(self, native, monkeypatch):
        if native and not backends()["cpp"]:
            pytest.skip("needs the C++ extension")
        monkeypatch.setattr(dispatch, "HAS_EXTENSION", native)

    def test_sees_what_moves_and_not_what_changes(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        fixed = runtime.Fixed.of(model)
        with torch.no_grad():
            model[0].weight += 1
        assert fixed.moved() is None
        model[1].running_mean = torch.zeros(3)
        assert fixed.moved() == "1.running_mean"
        fixed = runtime.Fixed.of(model)
        model[0].bias.data = torch.zeros(3)
        assert fixed.moved() == "0.bias"
