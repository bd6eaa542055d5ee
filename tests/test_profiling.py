"""Ranges: their names, nesting and counts; and that they are nothing while they are off."""

import ast
import contextlib
import json
import runpy
import sys
import threading
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile

import imf_kernels
from benchmarks import profile as benchmark
from imf_kernels import DSFlow, IntMeanFlow, MeanFlow, SplitMeanFlow, Teacher, o3s, profiling
from imf_kernels.graphs import GraphSampler, runtime
from imf_kernels.models import Baked, StepTokenDiT
from imf_kernels.sampler import sample
from imf_kernels.solver import euler
from tests.distill import tools as distill
from tests.graphs.tape import TapeSlot
from tests.models.tools import conditions, small_model
from tests.objectives.tools import real_batch, real_student, seeded

NAMES = {f"imf_kernels::{name}": name for name in profiling.SPANS}
"""As torch.profiler has them, beside ops of the same namespace."""


@pytest.fixture(autouse=True)
def _off():
    profiling.disable()
    yield
    profiling.disable()


@contextlib.contextmanager
def collected():
    """Counts of ranges, by the names from the outermost on, once the block has ended."""
    counts = Counter()
    profiling.enable("torch")
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        yield counts
    profiling.disable()
    for event in trace.events():
        if event.name in NAMES:
            path = []
            while event is not None:
                if event.name in NAMES:
                    path.insert(0, NAMES[event.name])
                event = event.cpu_parent
            counts[" > ".join(path)] += 1


class FakeDomain:
    """Stands in for `nvtx.Domain`: the ranges of each thread, open and all that were pushed."""

    def __init__(self):
        self.open, self.pushed = threading.local(), []

    def get_event_attributes(self, message, payload):
        return message, payload

    def push_range(self, attributes):
        stack = self.stack()
        stack.append(attributes)
        self.pushed.append((threading.get_ident(), *stack))

    def pop_range(self):
        self.stack().pop()

    def stack(self):
        if not hasattr(self.open, "stack"):
            self.open.stack = []
        return self.open.stack


@pytest.fixture
def domain(monkeypatch):
    found = FakeDomain()
    fake = types.SimpleNamespace(get_domain={profiling.DOMAIN: found}.__getitem__)
    monkeypatch.setitem(sys.modules, "nvtx", fake)
    return found


def noise(rows=2, frames=12):
    return torch.randn(rows, frames, 12, generator=seeded())


@pytest.fixture
def taped(monkeypatch):
    """Graphs on the CPU: see `tests/graphs/tape.py`."""
    monkeypatch.setattr(runtime, "slot_on", TapeSlot)


# -- what is shown --------------------------------------------------------------------------------


def test_a_solve():
    model = small_model("f5_v1").student().eval()
    with collected() as counts:
        cond = model.prepare(**conditions(model, [12, 7]))
        sample(model, noise(), cond, nfe=3)
    assert counts == {
        "prepare": 1,
        "solve": 1,
        "solve > table": 1,
        "solve > sub-step": 3,
        "solve > sub-step > evaluation": 3,
    }


def test_a_solve_with_step_tokens():
    model = StepTokenDiT.of(small_model("f5_v1")).eval()
    with collected() as counts:
        sample(model, noise(), model.prepare(**conditions(model, [12, 7]), steps=2), nfe=2)
    assert counts == {
        "prepare": 1,
        "solve": 1,
        "solve > table": 1,
        "solve > sub-step": 2,
        "solve > sub-step > evaluation": 2,
    }


def test_a_guided_rollout():
    teacher = Teacher(small_model("cosyvoice3"), 2.0)
    t, r = torch.zeros(2), torch.ones(2)
    with collected() as counts:
        cond = teacher.prepare(**conditions(teacher.model, [12, 7]))
        teacher.integrate(noise(), t, r, 4, cond)
        teacher.velocity(noise(), t, cond)
    assert counts == {
        "prepare": 1,
        "rollout": 1,
        "rollout > sub-step": 4,
        "rollout > sub-step > evaluation": 4,
        "rollout > sub-step > evaluation > table": 4,
        "evaluation": 1,
        "evaluation > table": 1,
    }


def test_a_request_to_graphs(taped):
    model = small_model("f5_v1").student().eval()
    sampler = GraphSampler(model, 2, [(2, 16)])
    given = conditions(model, [12, 7])
    with collected() as first:
        want = sampler.sample(noise(), conditions=given)
    with collected() as second:
        got = sampler.sample(noise(), conditions=given)
    request = {"solve": 1, "solve > copy-in": 1, "solve > replay": 1, "solve > copy-out": 1}
    assert second == request
    inside = {path for path in first if path.startswith("solve > capture > ")}
    outside = {path: first[path] for path in first.keys() - inside}
    assert outside == request | {"solve > capture": 3, "solve > table": 1, "solve > prepare": 1}
    assert {path.split(" > ")[2] for path in inside} == {"prepare", "table", "sub-step"}
    assert torch.equal(got, want)


def test_a_request_without_graphs():
    model = small_model("f5_v1").student().eval()
    with collected() as counts:
        GraphSampler(model, 2, [(2, 16)]).sample(noise(), conditions=conditions(model, [12, 7]))
    assert counts == {
        "solve": 1,
        "solve > prepare": 1,
        "solve > table": 1,
        "solve > sub-step": 2,
        "solve > sub-step > evaluation": 2,
    }


ROLLOUT = {"prepare": 1, "rollout": 1, "rollout > sub-step": 4}
ROLLOUT |= {"rollout > sub-step > evaluation": 4, "rollout > sub-step > evaluation > table": 4}
OBJECTIVES = {
    "IntMeanFlow": (
        lambda *_, **options: IntMeanFlow(*_, nfe=4, targets=2, **options),
        ROLLOUT | {"loss": 1, "loss > prepare": 1, "loss > evaluation": 2},
    ),
    "DSFlow": (
        lambda *_, **options: DSFlow(*_, nfe=4, counts=(2,), **options),
        ROLLOUT
        | {"loss": 1, "loss > prepare": 1, "loss > evaluation": 1}
        | {"loss > sub-step": 2, "loss > sub-step > evaluation": 2},
    ),
    "SplitMeanFlow": (
        SplitMeanFlow,
        {"loss": 1, "loss > prepare": 2, "loss > evaluation": 4, "loss > evaluation > table": 3},
    ),
    "MeanFlow": (
        lambda *_, **options: MeanFlow(*_, derivative="difference", **options),
        {"loss": 1, "loss > prepare": 3, "loss > evaluation": 4, "loss > evaluation > table": 3},
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective(name):
    """Its evaluations without gradient make tables; and its loss does not know of ranges."""
    make, expected = OBJECTIVES[name]
    student, teacher = real_student("f5_v1"), Teacher(small_model("f5_v1"), 2.0)
    batch = real_batch(student)
    want, _ = make(teacher, generator=seeded())(student, batch)
    with collected() as counts:
        got, _ = make(teacher, generator=seeded())(student, batch)
    assert counts == expected
    assert torch.equal(got, want)


def test_a_forward_mode_derivative():
    student, teacher = real_student("f5_v1"), Teacher(small_model("f5_v1"), 2.0)
    batch = real_batch(student)
    want, _ = MeanFlow(teacher, generator=seeded())(student, batch)
    with collected() as counts:
        got, _ = MeanFlow(teacher, generator=seeded())(student, batch)
    assert counts["loss"] == 1
    assert torch.equal(got, want)


def test_a_search():
    model = small_model("f5_v1").student().eval()
    cond = model.prepare(**conditions(model, [12, 7]))
    metric = o3s.on_samples(model, noise(), cond, lambda mels: float(mels.square().mean()))
    with collected() as counts:
        result = o3s.search(metric, 2, higher_is_better=False, budget=3)
    assert len(result.evaluations) == 3
    assert counts["o3s candidate"] == counts["o3s candidate > solve"] == 3


def test_a_checkpoint(tmp_path):
    with collected() as counts:
        distill.trainer(tmp_path, updates=2, save_every=1).run()
    assert counts["checkpoint"] == 2
    assert counts["loss"] == counts["rollout"] == 2


def test_every_range_has_a_name_of_the_list():
    package = Path(imf_kernels.__file__).parent
    used = {
        node.args[0].value
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).split(".")[-1] in ("span", "spanned")
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    }
    assert used == profiling.SPANS.keys()


# -- NVTX -----------------------------------------------------------------------------------------


def test_nvtx_gets_the_ranges_with_their_payload(domain):
    model = small_model("f5_v1").student().eval()
    cond = model.prepare(**conditions(model, [12, 7]))
    profiling.enable()
    sample(model, noise(), cond, nfe=2)
    solve, step = ("solve", 2), ("sub-step", None)
    one = [(solve, step), (solve, step, ("evaluation", None))]
    assert [stack for _, *stack in domain.pushed] == [
        list(stack) for stack in [(solve,), (solve, ("table", None)), *one, *one]
    ]
    assert domain.stack() == []


def test_arguments_are_checked_before_their_range(domain):
    teacher = Teacher(small_model("f5_v1"))
    profiling.enable("nvtx")
    with pytest.raises(ValueError, match=r"nfe: expected an integer >= 1, got \[4\]"):
        teacher.integrate(noise(), torch.zeros(2), torch.ones(2), [4])
    assert domain.pushed == []


def test_ranges_end_where_the_body_raises(domain):
    profiling.enable("nvtx")

    @profiling.spanned("loss")
    def fail():
        with profiling.span("prepare"):
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert [stack[-1][0] for _, *stack in domain.pushed] == ["loss", "prepare"]
    assert domain.stack() == []


def test_a_range_ends_as_it_began(domain):
    with profiling.span("solve"):
        profiling.enable("nvtx")
    assert domain.pushed == []
    with profiling.span("solve"):
        profiling.enable("torch")
        with profiling.span("table"):
            profiling.disable()
        assert len(domain.stack()) == 1
    assert domain.stack() == []


def test_threads_have_ranges_of_their_own(domain):
    together = threading.Barrier(4)
    left = []

    def work():
        for _ in range(50):
            with profiling.span("solve", 3), profiling.span("sub-step"):
                together.wait(timeout=10)
                if together.n_waiting == 0:
                    profiling.enable("nvtx")  # while others are inside
        left.append(domain.stack())

    threads = [threading.Thread(target=work) for _ in range(4)]
    profiling.enable("nvtx")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert left == [[]] * 4
    stacks = Counter(tuple(stack) for _, *stack in domain.pushed)
    assert stacks == {(("solve", 3),): 200, (("solve", 3), ("sub-step", None)): 200}


def test_the_real_nvtx_without_a_tool():
    pytest.importorskip("nvtx")
    profiling.enable("nvtx")
    with profiling.span("solve", 3), profiling.span("evaluation"):
        assert profiling.enabled()


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(ImportError, match=r"nvtx.*'\.\[profile\]'"):
        profiling.enable("nvtx")
    assert not profiling.enabled()
    with pytest.raises(ValueError, match="to: expected one of nvtx, torch, got 'itt'"):
        profiling.enable("itt")


def test_the_environment_enables(monkeypatch, domain):
    def imported():
        return runpy.run_path(profiling.__file__)["enabled"]()

    assert not imported()
    monkeypatch.setenv("IMF_KERNELS_NVTX", "")
    assert not imported()
    monkeypatch.setenv("IMF_KERNELS_NVTX", "1")
    assert imported()
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.warns(RuntimeWarning, match=r"IMF_KERNELS_NVTX=1 has no effect.*\[profile\]"):
        assert not imported()
    monkeypatch.setenv("IMF_KERNELS_NVTX", "yes")
    with pytest.raises(ValueError, match="IMF_KERNELS_NVTX: expected one of 0, 1, got 'yes'"):
        imported()


# -- off, and traced ------------------------------------------------------------------------------


def test_off_is_one_object_for_all(domain, monkeypatch):
    """No object is made, nothing is called: what would be is taken away."""
    profiling.enable("nvtx")
    profiling.disable()
    monkeypatch.setattr(profiling, "_Range", None)
    monkeypatch.setattr(torch._C._profiler, "_RecordFunctionFast", None)
    spans = [profiling.span(name, payload) for name in profiling.SPANS for payload in (None, 3)]
    assert {id(span) for span in spans} == {id(spans[0])}
    model = small_model("f5_v1").student().eval()
    sample(model, noise(), model.prepare(**conditions(model, [12, 7])), nfe=2)
    assert domain.pushed == []


class Solve(nn.Module):
    """All that a baked student does for a request, with the ranges around it."""

    def __init__(self, student):
        super().__init__()
        baked = Baked.of(student, ["uniform"], nfe=2)
        self.model, self.tables = baked.model, baked.at(baked.grids[0])

    @profiling.spanned("solve")
    def forward(self, x, prompt, mu, spks):
        cond = self.model.prepare(prompt, mu=mu, spks=spks)
        dt = torch.full((2, len(x)), 0.5)

        def velocity(k, state):
            return self.model.evaluate(state, self.tables.at(k), cond)

        return euler(velocity, x, dt, accumulate=False).x


def test_tracing_knows_nothing_of_ranges(domain):
    solve = Solve(small_model("cosyvoice3", depth=1).student().eval())
    given = conditions(solve.model, [12, 12])
    given = (noise(), given["prompt"], given["mu"], given["spks"])
    traced = []
    with torch.no_grad():
        want = solve(*given)
        compiled = torch.compile(solve, fullgraph=True, backend="eager")
        traced.append(compiled(*given))
        for to in ("nvtx", "torch"):
            profiling.enable(to)
            graph = make_fx(solve)(*given)
            assert not [node for node in graph.graph.nodes if "profiler" in str(node.target)]
            traced.append(graph(*given))
        traced.append(compiled(*given))
        exported = torch.export.export(solve, given)
        traced.append(exported.module()(*given))
    assert not [node for node in exported.graph.nodes if "profiler" in str(node.target)]
    for got in traced:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# -- the tables -----------------------------------------------------------------------------------


def run(arguments, monkeypatch):
    command = f"profile --model tiny --device cpu --seconds 0.2 --prompt 0.1 {arguments}"
    monkeypatch.setattr("sys.argv", command.split())
    assert benchmark.main() == 0


def test_the_table_of_ranges(tmp_path, monkeypatch, capsys):
    run(f"--nfe 2 --guidance 1.5 --rounds 2 --out {tmp_path / 'profile.json'}", monkeypatch)
    assert not profiling.enabled()
    solves, evaluation, operations = json.loads((tmp_path / "profile.json").read_text())["rows"]
    rows = {row["range"]: row for row in solves["ranges"]}
    counts = {"solve": 1, "sub-step": 2, "evaluation": 2, "prepare": 1, "table": 1}
    assert {name: row["count"] for name, row in rows.items()} == counts
    outermost = rows["solve"]["total"] + rows["prepare"]["total"]
    assert sum(row["self"] for row in rows.values()) == pytest.approx(outermost)
    assert rows["solve"]["share"] + rows["prepare"]["share"] == pytest.approx(1)
    assert rows["sub-step"]["mean"] == pytest.approx(rows["sub-step"]["total"] / 2)
    assert all(0 <= row["self"] <= row["total"] for row in rows.values())
    assert evaluation["kernels"]["count"] > 50
    found = {row["name"]: row for row in operations["operations"]}
    assert found["imf_kernels.attention"]["count"] == 2
    assert all(row["us"] > 0 and row["floor"] > 0 for row in found.values() if row["count"] > 1)
    printed = capsys.readouterr().out
    assert "evaluation          2" in printed
    assert "one evaluation:" in printed
    assert "one evaluation, by operation" in printed


def test_solves_for_nsight(monkeypatch, domain):
    run("--nsight --nfe 2 --rounds 3", monkeypatch)
    assert [stack for _, *stack in domain.pushed].count([("solve", 2)]) == 3


def test_tables_of_the_document_are_those_of_the_code():
    page = (Path(__file__).parents[1] / "docs/profiling.md").read_text()
    rows = [f"| {name} | {text} |" for name, text in profiling.SPANS.items()]
    assert "\n".join(rows) in page
    assert benchmark.operations() in page


@pytest.mark.gpu
@pytest.mark.parametrize("to", ["nvtx", "torch"])
def test_captures_and_replays_with_ranges(domain, to):
    model = small_model("f5_v1").student().eval().cuda()
    given = {k: v.cuda() for k, v in conditions(model, [12, 7]).items()}
    x = noise().cuda()
    want = GraphSampler(model, 2, [(2, 16)]).sample(x, conditions=given)
    profiling.enable(to)
    sampler = GraphSampler(model, 2, [(2, 16)])
    for _ in range(2):
        assert torch.equal(sampler.sample(x, conditions=given), want)
    assert sampler.stats().hits == 2
    if to == "nvtx":
        assert [stack[-1][0] for _, *stack in domain.pushed[-4:]] == [
            "solve",
            "copy-in",
            "replay",
            "copy-out",
        ]
        assert domain.stack() == []
