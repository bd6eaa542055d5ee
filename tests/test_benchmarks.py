"""The benchmarks run and report what they say they do; no figure is asserted."""

import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import __main__ as suites
from benchmarks import (
    contest,
    deployment,
    distillation,
    facts,
    launches,
    on_gpu,
    operations,
    plain,
    streaming,
    test_evaluation,
    test_ops,
    timing,
    workload,
)
from benchmarks.timing import Ceilings, interleaved
from imf_kernels import sampler
from imf_kernels.ops import _flash
from tests import pages

ROOT = pages.ROOT


@pytest.fixture(autouse=True)
def one_thread():
    """For models this small a second thread costs time, on a busy machine a lot of it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(module, arguments, out, monkeypatch, status=0):
    """What the script writes, run with these arguments in this process."""
    name = module.__name__.rpartition(".")[2]
    monkeypatch.setattr(
        "sys.argv", [name, *arguments.split(), "--device", "cpu", "--out", str(out)]
    )
    assert module.main() == status
    results = json.loads(out.read_text())
    assert results["command"].startswith(f"python -m benchmarks.{name} ")
    assert {"device", "dtype", "versions", "commit", "backends", "failures"} <= results.keys()
    return results


def test_own_results_leave_the_commit_clean(tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "__file__", str(tmp_path / "benchmarks" / "facts.py"))
    code, result = tmp_path / "code.py", tmp_path / "benchmarks" / "results" / "cpu" / "ops.json"
    result.parent.mkdir(parents=True)
    result.write_text("1")
    code.write_text("1")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    (head,) = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).split()
    result.write_text("2")
    assert facts.commit() == head
    code.write_text("2")
    assert facts.commit() == f"{head}-dirty"


@pytest.mark.timeout(900)
def test_every_path_of_every_suite(tmp_path):
    """In one run, for it takes half a minute."""
    out = tmp_path / "new" / "tiny.json"
    names = list(dict.fromkeys(part.suite for part in suites.PARTS.values()))
    options = ["--selection=tiny", "--device=cpu", "--rounds=2", "--commit=abc", "-q"]
    done = subprocess.run(
        suites.command(names, out, options),
        cwd=ROOT,
        env=suites.environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    results = json.loads(out.read_text())
    every_record_says_what_it_is(results)
    every_contender_takes_part(results)
    records_tell_what_they_found(results)


def every_record_says_what_it_is(tiny):
    told = {"device", "cpu", "dtype", "threads", "versions", "commit", "backends", "command"}
    assert told <= tiny["machine_info"].keys()
    assert tiny["commit_info"]["id"] == tiny["machine_info"]["commit"] == "abc"
    assert tiny["selection"] == "tiny"
    assert tiny["ceilings"].keys() == {"flops", "bandwidth"}
    groups: dict[str, dict[str, str]] = {}
    for record in tiny["benchmarks"]:
        told = record["extra_info"]
        assert record["group"].startswith(f"{told['suite']} | ")
        assert record["name"].endswith(f": {told['contender']}")
        assert {"device": "CPU", "dtype": "float32"}.items() <= told["row"].items()
        assert told["error"] <= told["bound"]
        assert len(record["stats"]["data"]) == 2
        assert record["stats"]["median"] == statistics.median(record["stats"]["data"]) > 0
        contenders = groups.setdefault(record["group"], {})
        assert told["contender"] not in contenders
        contenders[told["contender"]] = told["role"]
    for contenders in groups.values():
        assert list(contenders.values()).count("baseline") == 1
        assert "ours" in contenders.values()
    assert {group.split(" | ")[0] for group in groups} == {
        part.suite for part in suites.PARTS.values()
    }


def every_contender_takes_part(tiny):
    entered: dict[str, set[str]] = {}
    for record in tiny["benchmarks"]:
        told = record["extra_info"]
        entered.setdefault(told["suite"], set()).add(told["contender"])
    compiled = {"torch.compile", "torch.compile, graph"}
    ours = {"ours, eager", "ours, graph", "ours, baked", "ours, fp8"}
    assert entered["rtf"] - {"F5-TTS"} == {"plain", *ours, *compiled}
    ranges = {"no range", "ours, off", "ours, torch"}
    assert entered["evaluation"] - {"ours, nvtx"} == {"plain", "ours", "ours, fp8", *ranges}
    assert entered["ops"] == {"plain", "ours", "torch.compile"}
    graphs = {"ours, graph", "ours, graph, one grid", "recaptured"}
    assert entered["search"] == {"plain", "ours, eager", *graphs}
    assert entered["latency"] == {"plain", "ours, graph", "ours, eager"}
    rollouts = {"ours", "ours, packed", "ours, packed, fp8", "plain"}
    meanflow = {"ours, IntMeanFlow", "ours, jvp", "ours, difference", "jvp as published"}
    assert entered["training"] == rollouts | meanflow
    for out in tiny["left_out"]:
        assert out["contender"] in {"F5-TTS", "ours, nvtx", *ours, *compiled}
        assert out["why"]
        assert out["suite"] in entered


def records_tell_what_they_found(tiny):
    told = {
        (record["extra_info"]["suite"], record["extra_info"]["contender"]): record["extra_info"]
        for record in tiny["benchmarks"]
    }
    assert told["rtf", "ours, eager"]["audio_seconds"] == pytest.approx(0.2)
    assert told["rtf", "ours, eager"]["floor_seconds"] > 0
    assert told["rtf", "ours, baked"]["weight_bytes"] > 0
    assert told["ops", "ours"]["bytes"] > 0
    evaluation = told["evaluation", "ours"]
    assert evaluation["kernels"]["count"] > 50
    assert sum(kernel["share"] for kernel in evaluation["kernels"]["top"]) <= 1.001
    assert told["search", "ours, eager"].keys() >= {"error", "bound"}
    latency = told["latency", "ours, graph"]
    assert 0 < latency["p50"] <= latency["p99"]


ROWS = """
import os

import pytest

from benchmarks.contest import Unavailable


def right(result):
    return 0.0, 1.0


@pytest.mark.rows(of=lambda conditions: [conditions.row(op=op) for op in "abcdefg"])
def test_rows(row, contest):
    def unavailable():
        raise Unavailable("not here")

    def broken():
        raise ZeroDivisionError("in a peer")

    if row["op"] == "f":
        raise ValueError("of a row")
    if row["op"] == "g":
        os._exit(9)
    contest.enter("ours", lambda: lambda: 1, lambda _: (float(row["op"] == "b"), 0.5), role="ours")
    contest.enter("nan", lambda: int, lambda _: (float("nan" if row["op"] == "c" else 0), 1.0))
    contest.enter("peer", broken if row["op"] == "d" else unavailable, right)
    contest.enter("plain", unavailable if row["op"] == "e" else lambda: int, right, role="baseline")
    contest.time()
"""


def test_only_right_rows_with_a_baseline_and_all_before_a_crash(tmp_path):
    file, out = tmp_path / "test_made.py", tmp_path / "made.json"
    file.write_text(ROWS)
    options = ["-p", "benchmarks.conftest", "--device=cpu"]
    command = suites.command([], out, [str(file), *options])
    env = suites.environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 9
    results = json.loads(out.read_text())
    assert [record["name"] for record in results["benchmarks"]] == [
        *(f"test_rows[a]: {name}" for name in ("ours", "nan", "plain")),
        *(f"test_rows[c]: {name}" for name in ("ours", "plain")),
        *(f"test_rows[d]: {name}" for name in ("ours", "nan", "plain")),
    ]
    left_out = {
        (out["row"]["op"], out["contender"]): out["why"]
        for out in results["left_out"]
        if (out["contender"], out["why"]) != ("peer", "not here")
    }
    assert left_out == {
        ("b", "ours"): "wrong: error 1.00e+00, at most 5.00e-01 expected",
        ("b", None): "no contender is ours",
        ("c", "nan"): "wrong: error nan, at most 1.00e+00 expected",
        ("d", "peer"): "ZeroDivisionError: in a peer",
        ("e", "plain"): "not here",
        ("e", None): "no contender is baseline",
        ("f", None): "ValueError: of a row",
    }
    command = suites.command([], out, [f"{file}::test_rows[c]", *options])
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "nan is wrong: error nan, at most 1.00e+00 expected" in done.stdout


def test_rows_without_time_left_are_said_to_be(tmp_path):
    out = tmp_path / "ops.json"
    options = ["--selection=tiny", "--device=cpu", "--minutes=0", "-k", "grn_gelu"]
    command = suites.command(["ops"], out, options)
    subprocess.run(command, cwd=ROOT, env=suites.environment(), capture_output=True, check=True)
    results = json.loads(out.read_text())
    assert results["benchmarks"] == []
    assert {out["why"] for out in results["left_out"]} == {"no time left of 0 minutes"}


def test_a_row_goes_on_for_its_seconds(monkeypatch):
    times = iter(range(100))
    monkeypatch.setattr(contest.time, "monotonic", lambda: float(next(times)))

    def rounds(seconds, fixed=None):
        cpu = torch.device("cpu")
        conditions = contest.Conditions(cpu, torch.float32, "cpu", seconds, fixed)
        return len(list(contest.Contest(conditions, None, None).rounds()))

    assert rounds(seconds=6.5) == 6
    assert rounds(seconds=2.0) == contest.FEWEST
    assert rounds(seconds=0.5) == 2
    assert rounds(seconds=0.5, fixed=4) == 4


def test_what_fails_does_not_stop_the_rest(tmp_path, monkeypatch):
    given = {}

    def command(names, out, options):
        given[out.name] = options
        return [sys.executable, "-c", f"raise SystemExit({int(names == ['ops'])})"]

    monkeypatch.setattr(suites, "command", command)
    to = ["--device=cpu", f"--out={tmp_path}"]
    assert suites.main(["ops", "latency", "--minutes=22", "--rounds=1", *to]) == 1
    assert list(given) == ["ops.json", "latency.json"]
    for options in given.values():
        assert options[:2] == ["--device=cpu", "--rounds=1"]
    minutes = [float(options[2].removeprefix("--minutes=")) for options in given.values()]
    assert minutes[0] == pytest.approx(12)  # their shares are 1.2 and 1
    assert 21 < minutes[1] <= 22
    assert suites.main(["latency", *to]) == 0


def test_every_selection_has_rows():
    cpu = torch.device("cpu")
    for selection in ("cpu", "gpu", "full", "tiny"):
        conditions = contest.Conditions(cpu, torch.float32, selection, 1.0, None)
        for suite in {part.suite for part in suites.PARTS.values()}:
            module = importlib.import_module(f"benchmarks.test_{suite}")
            for name, test in vars(module).items():
                if name.startswith("test_") and hasattr(test, "pytestmark"):
                    (mark,) = test.pytestmark
                    rows = mark.kwargs["of"](conditions)
                    assert len({json.dumps(row) for row in rows}) == len(rows) > 0


@pytest.mark.parametrize("name", ["tiny", "tiny_cosyvoice2"])
def test_the_plain_model_is_the_model(name):
    """A ragged guided batch, and one graph under torch.compile, also from step tables."""
    model, _ = workload.build(name, torch.device("cpu"), torch.float32)
    noise, given = workload.request(model, 2, 40, 5, [40, 23])
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    twin = plain.plain(model)
    step = torch.compile(twin.evaluate, fullgraph=True, dynamic=False, backend=count)
    with torch.no_grad():
        cond = model.prepare(**given, guided=True)
        want = sampler.sample(model, noise, cond, nfe=2, guidance=2.0)
        compiled = plain.Compiled(twin)
        compiled.evaluate = step
        for other in (twin, compiled):
            got = plain.plainly(sampler.sample)(other, noise, cond, nfe=2, guidance=2.0)
            assert workload.error(got - noise, want - noise) <= 1e-5
    assert len(graphs) == 1


def test_streaming_on_the_cpu(tmp_path, monkeypatch, capsys):
    rows = run(streaming, "--quick --threads 1", tmp_path / "streaming.json", monkeypatch)["rows"]
    assert len(rows) == 2 * 3 * 2
    for row in rows:
        evaluations = row["nfe"] * (1 + row["guided"])
        blocks = row["seconds"]
        assert row["frames_evaluated"]["incremental"] == evaluations * 50 * blocks
        assert row["frames_evaluated"]["prefix"] == evaluations * 25 * blocks * (blocks + 1)
        assert row["max_relative_rms"] <= 1e-5
        assert row["ratio"] > 0
        assert 0 < row["last_block_ms"]["prefix"] <= row["ms"]["prefix"]
        assert row["stream_bytes"] > 0
    assert "prefix" in capsys.readouterr().out


def test_deployment_on_the_cpu(tmp_path, monkeypatch, capsys):
    """Of the student itself; whose exports are compiled or translated for longer."""
    arguments = "--size tiny --depth 1 --seconds 1 2 --nfe 1 --rounds 2 --threads 1 --exports"
    results = run(deployment, arguments, tmp_path / "deployment.json", monkeypatch)
    assert [row["frames"] for row in results["rows"]] == [94, 188]
    for row in results["rows"]:
        (ours,) = row["runtimes"].values()
        assert ours["seconds"] > 0
        assert ours["relative_rms"] == 0
        assert ours["peak_bytes"] > 2**26  # PyTorch's own
    assert deployment.table(results) in capsys.readouterr().out


def test_a_runtime_that_answers_otherwise_has_no_row():
    inputs = {"noise": np.zeros((1, 4, 2))}
    solves = {"ours": lambda given: given["noise"] + 1, "other": lambda given: given["noise"] + 2}
    with pytest.raises(ArithmeticError, match="'other': 1"):
        deployment.measure(solves, inputs, rounds=1)


def test_table_of_deployment():
    took = {"seconds": 0.5, "peak_bytes": 15e8}
    row = {"nfe": 3, "seconds": 10, "runtimes": {"ours": took, "other": {**took, "seconds": 0.25}}}
    assert deployment.table({"rows": [row]}).splitlines() == [
        "| steps | audio | ours | other |",
        "|---|---|---|---|",
        "| 3 | 10 s | 0.500 s, 1.50 GB | 0.250 s, 1.50 GB |",
    ]


def test_bytes_of_an_op():
    """Forward of a residual norm: two tensors in, two out; its backward four in, two out."""
    size, case = (
        test_ops.Size(2, 512, torch.bfloat16, dim=256),
        test_ops.CASES["gated_residual_norm"],
    )
    tensor = 2 * 512 * 256 * 2
    for backward, tensors in ((False, 4), (True, 10)):
        call = test_ops.Call(case, case.make(size), backward)
        assert test_ops.work(case, call, size)[0] == pytest.approx(tensors * tensor, rel=0.01)


def test_products_and_attention_are_the_flops_of_an_evaluation():
    """But for the position convolutions, 1.3 % of them."""
    model, _ = workload.build("f5_base", torch.device("meta"), torch.bfloat16)
    sizes = test_evaluation.products(model.config).values()
    flops = sum(2 * 1250 * inputs * outputs * count for inputs, outputs, count in sizes)
    flops += model.config.depth * 4 * 1250**2 * model.config.dim
    all_of_them, _ = workload.work(model, [1250], 1)
    assert flops == pytest.approx(all_of_them, rel=0.02)
    assert flops < all_of_them


@pytest.mark.parametrize("problem", [ImportError, OSError, AttributeError, RuntimeError])
def test_a_library_that_does_not_load_is_no_candidate(problem, monkeypatch):
    def broken():
        raise problem("undefined symbol")

    def works():
        return lambda q, k, v, rows, scale: (q, q)

    libraries = {"broken": _flash.Library(broken, (8,)), "works": _flash.Library(works, (8,))}
    monkeypatch.setattr(_flash, "LIBRARIES", libraries)
    model, _ = workload.build("tiny", torch.device("cpu"), torch.float32)
    candidates = test_evaluation.attention_candidates(model, 1, 8, cuda=True)
    assert candidates.keys() == {"flash", "ours", "works", "cudnn"}


def test_launches_are_means_of_calls(monkeypatch):
    calls, traces = [], []

    def run():
        for _ in calls:  # none while it warms up, 1 to 5 while it is profiled
            torch.ones(2).sin()
        calls.append(1)

    def profile(**given):
        traces.append(torch.profiler.profile(**given))
        return traces[0]

    monkeypatch.setattr(launches, "profile", profile)
    found = launches.launches(run, torch.device("cpu"))
    (sine,) = (each for each in found["top"] if each["name"] == "aten::sin")
    assert sine["count"] == 3
    entries = traces[0].key_averages()
    assert found["count"] == sum(entry.count for entry in entries) / 5
    assert found["us"] == pytest.approx(entries.self_cpu_time_total / 5)
    for key, whole in (("us", found["us"]), ("share", 1)):
        assert sum(each[key] for each in found["top"]) == pytest.approx(whole)


SLOW = """
import subprocess, sys, time
late = "import signal, time, pathlib; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(5); "
subprocess.Popen([sys.executable, "-c", late + "pathlib.Path('{}').touch()"])
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_parts_for_a_gpu_do_not_stop_each_other(tmp_path, monkeypatch, capsys):
    def python(code, minutes=1.0):
        return on_gpu.Part((sys.executable, "-c", code), minutes)

    made = {
        "wrong": python("print('why'); raise SystemExit(3)"),
        "slow": python(SLOW.format(tmp_path / "grown"), minutes=0.05),
        "absent": python("", 1.0)._replace(needs=("torch", "no_such_thing")),
        "right": python("print('all is well')"),
    }
    monkeypatch.setattr(on_gpu, "parts", lambda device, results: made)
    arguments = ["--device", "cpu", "--logs", str(tmp_path)]
    assert on_gpu.main(arguments) == 1
    ended = [line.split(" after")[0] for line in capsys.readouterr().out.splitlines()]
    assert ended[:3] == [
        "wrong: failed with status 3",
        "slow: failed: stopped",
        "absent: left out: no_such_thing missing",
    ]
    assert (tmp_path / "slow.log").read_text() == "interrupted\n"
    time.sleep(2.5)
    assert not (tmp_path / "grown").exists()  # what it had started has ended with it
    assert ended[3].startswith("right: done in ")
    assert (tmp_path / "wrong.log").read_text() == "why\n"
    assert on_gpu.main([*arguments, "right"]) == 0
    with pytest.raises(SystemExit):
        on_gpu.main([*arguments, "other"])
    assert "expected any of wrong, slow, absent, right, got other" in capsys.readouterr().err


def test_parts_for_a_gpu_are_commands_of_this_project():
    found = on_gpu.parts("cuda", Path("results"))
    assert list(found)[:3] == ["build", "tests", "bench"]
    for part in found.values():
        for option, name in itertools.pairwise(part.command):
            if option == "-m" and "." in name:
                assert importlib.util.find_spec(name) is not None


def test_distillation_on_the_cpu(tmp_path, monkeypatch, capsys):
    arguments = "--size tiny --rows 2 --frames 2048 --nfe 0 2 4 8 --targets 1 2"
    results = run(distillation, arguments, tmp_path / "distillation.json", monkeypatch)
    found = {(row["part"], row["rows"], row["run"]): row for row in results["rows"]}

    alone, *steps = (found["teacher", 2, f"NFE {nfe}"] for nfe in (0, 2, 4, 8))
    flops = [row["flops"] for row in steps]
    guided = (flops[1] - flops[0]) / 2  # an evaluation, of both branches
    assert flops[2] - flops[1] == pytest.approx(4 * guided)
    assert {row["bytes"] for row in steps} == {alone["bytes"]}  # the rollout is over by then
    one, both = (found["targets", 2, f"{count} targets"] for count in (1, 2))
    assert both["flops"] == pytest.approx(2 * one["flops"], rel=1e-3)
    assert both["bytes"] < 1.1 * one["bytes"]  # one after the other, in the same memory
    for rows in (1, 2):
        ours, recorded = (
            found["jvp", rows, f"MeanFlow, jvp{kind}"]["bytes"] for kind in ("", " as published")
        )
        assert 0 < 2 * ours < recorded
    assert distillation.tables(results) in capsys.readouterr().out


def test_tables_of_what_does_not_fit():
    fits = {"rows": 1, "frames": 8, "seconds": 0.5, "bytes": 2**31}
    rows = [{"part": "teacher", "run": f"NFE {nfe}", **fits} for nfe in (0, 2)]
    rows += [{"part": "targets", "run": run, **fits} for run in ("rollout", "1 targets")]
    rows.append({**fits, "part": "targets", "run": "8 targets", "seconds": None, "bytes": None})
    rows.append({**fits, "part": "jvp", "run": "jvp", "seconds": None, "bytes": None})
    tables = distillation.tables({"rows": rows})
    assert "| 2 | 0.500 | 2.0 | 1.00 | 1.12 | 1.20 |" in tables
    assert "| 1 | 1.000 | 0.625 | 0.531 | 2.0 |" in tables
    assert "| 8 | does not fit |" in tables
    assert "| jvp | does not fit | does not fit |" in tables


def test_bytes_held_by_a_gradient():
    """Every sine keeps its input; backward adds a cosine and a gradient at a time."""
    x = torch.zeros(1000, 1000, device="meta", requires_grad=True)

    def chain(length):
        y = x
        for _ in range(length):
            y = y.sin()
        y.sum().backward()

    for length in (1, 5):
        x.grad = None
        assert operations.count(lambda length=length: chain(length)).held == pytest.approx(
            (length + 2) * x.nbytes, rel=1e-3
        )


def test_floor_of_an_f5_base_evaluation():
    """0.61 TFLOP at 10 s generated after a 3.3 s prompt, 378 MB of weights in bf16."""
    model, _ = workload.build("f5_base", torch.device("meta"), torch.bfloat16)
    flops, nbytes = workload.work(model, [1250], 1)
    assert flops == pytest.approx(0.61e12, rel=0.03)
    assert nbytes == pytest.approx(378e6, rel=0.03)
    assert workload.limit(flops, nbytes, Ceilings(1e12, 1e12)) == flops / 1e12
    assert workload.limit(flops, nbytes, Ceilings(1e30, 1e9)) == nbytes / 1e9


def test_contenders_take_turns():
    turns = []
    times = interleaved(
        {name: lambda name=name: turns.append(name) for name in "ab"},
        torch.device("cpu"),
        rounds=3,
        warm_ups=1,
    )
    assert "".join(turns) == "ab" + "ab" * 3
    assert times["a"].low <= times["a"].median <= times["a"].high


def test_times_on_a_device_are_of_one_call(monkeypatch):
    """Calls are chained up to the span of a measurement."""
    spent = []

    def clock(run, device):
        spent.clear()
        run()
        return sum(spent)

    monkeypatch.setattr(timing, "device_milliseconds", clock)
    contenders = {ms: lambda ms=ms: spent.append(ms) for ms in (0.5, 3.0)}
    taken = timing.turns_on_device(contenders, torch.device("cuda"), range(3))
    assert taken == {0.5: [0.5] * 3, 3.0: [3.0] * 3}


def test_operations_of_an_evaluation(tmp_path):
    """At most 8 a block and 210 in all at the depth of F5 base; backends.md says the exact counts.

    Two heads, since the client's operations are fewer with one.
    """
    out = tmp_path / "count.json"
    command = [sys.executable, "-m", "benchmarks.count", "--dim", "128", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {k: v for k, v in json.loads(out.read_text()).items() if v is not None}
    ours = {name: row for name, row in rows.items() if "own" not in name}
    assert len(ours) == 11
    for name, row in ours.items():
        blocks, most = (14 * 4, 530) if name.startswith("cosyvoice2") else (22, 210)
        if name.endswith("in training"):  # which keeps the pre-activation, and embeds its times
            assert row["a block"] <= 9
            continue
        assert row["a block"] <= 8
        assert row["operations"] <= most
        assert row["names"]["imf_kernels.attention"] == blocks

    page = " ".join((pages.ROOT / "docs/backends.md").read_text().split())
    dit, packed, training = (
        rows[f"f5_v1{kind}"] for kind in (", unguided", " packed, guided", " in training")
    )
    unet, client = rows["cosyvoice2, unguided"], rows.get("F5-TTS's own, unguided")
    assert f"the DiT is {dit['a block']} operations a block and {dit['operations']} in all" in page
    assert f"packed and guided {packed['operations']}" in page
    assert f"{training['a block']} a block in training" in page
    assert f"U-Net is {unet['a block']} a block and {unet['operations']}." in page
    if client is not None:
        assert f"own: {client['a block']} and {client['operations']:,};" in page


def test_flops_of_an_evaluation():
    """Counted and derived FLOPs agree: 0.61 TFLOP at F5 base's sizes and 10 s after a prompt."""
    code = (
        "from benchmarks.count import ours; "
        "print(ours('f5_v1', False, 1250, dim=1024, depth=22, heads=16).flops)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(0.61e12, rel=0.03)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("f5_tts", "torchdiffeq")),
    reason="f5-tts is not installed (make test-hosts)",
)
def test_f5_sampler(tmp_path, monkeypatch):
    from benchmarks import f5_sampler

    out = tmp_path / "f5_sampler.json"
    arguments = f"--size tiny --seconds 0.5 --nfe 5 --rounds 2 --out {out}"
    monkeypatch.setattr("sys.argv", ["f5_sampler", *arguments.split()])
    f5_sampler.main()
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 3
    assert all(row["max_abs_difference"] <= 1e-4 for row in rows[:2])
    assert all(row["ratio"] > 0 for row in rows)
