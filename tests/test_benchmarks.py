"""The benchmarks run and report what they say they do; no figure is asserted."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from benchmarks import (
    count,
    distillation,
    evaluation,
    gpu,
    ops,
    plain,
    rollout,
    solver_graphs,
    streaming,
    timing,
    training,
    workload,
)
from benchmarks.timing import Ceilings, interleaved
from imf_kernels import dispatch, sampler
from imf_kernels.ops import modulated_layer_norm
from tests import pages


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


def test_solver_graphs_on_the_cpu(tmp_path, monkeypatch, capsys):
    arguments = (
        "--dtype float32 --models tiny --seconds 0.3 --prompt 0 0.2 --batch 1 2 "
        "--nfe 1 2 --columns eager ours --rounds 2"
    )
    results = run(solver_graphs, arguments, tmp_path / "new" / "solver_graphs.json", monkeypatch)
    assert len(results["rows"]) == 2 * 2 * 2 * 2
    for row in results["rows"]:
        assert set(row["ms"]) == {"eager", "ours"}
        assert set(row["errors"]) == {"plain", "eager", "ours"}
        assert row["wrong"] == []
        assert 0 < row["ms"]["ours"]["low"] <= row["ms"]["ours"]["median"]
        assert row["floor_ms"] > 0
        assert row["errors"]["eager"] <= 1e-5
    assert {row["prepare"] for row in results["rows"]} == {"inside", "outside"}
    assert set(results["new_grid_ms"]) == {"tiny, NFE 2"}
    assert "ours" in capsys.readouterr().out


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


def test_ops_on_the_cpu(tmp_path, monkeypatch):
    arguments = "--sizes tiny --columns plain ours --rounds 2"
    rows = run(ops, arguments, tmp_path / "ops.json", monkeypatch)["rows"]
    assert {row["op"] for row in rows} == set(ops.CASES)
    assert {row["op"] for row in rows if row["pass"] == "backward"} == {
        name for name, case in ops.CASES.items() if case.leaves
    }
    for row in rows:
        assert row["bytes"] > 0
        assert row["us"].keys() == {"plain", "ours"}
        assert row["speedup"].keys() == {"plain"}


def test_bytes_of_an_op():
    """Forward of a residual norm: two tensors in, two out; its backward four in, two out."""
    size, case = ops.Size(2, 512, torch.bfloat16, dim=256), ops.CASES["gated_residual_norm"]
    tensor = 2 * 512 * 256 * 2
    for backward, tensors in ((False, 4), (True, 10)):
        call = ops.Call(case, case.make(size), backward)
        assert ops.work(case, call, size)[0] == pytest.approx(tensors * tensor, rel=0.01)


def test_a_wrong_op_gets_no_row_and_the_run_goes_on(tmp_path, monkeypatch):
    cases = dict(ops.CASES)
    off = dataclasses.replace(cases["modulated_layer_norm"], run=_off_in_the_kernel)
    failing = dataclasses.replace(cases["attention"], run=_failing)
    monkeypatch.setattr(
        ops, "CASES", {"off": off, "failing": failing, "rope_qkv": cases["rope_qkv"]}
    )
    arguments = "--sizes tiny --columns plain ours --passes forward --rounds 2"
    results = run(ops, arguments, tmp_path / "ops.json", monkeypatch, status=1)
    assert [row["op"] for row in results["rows"]] == ["rope_qkv"]
    off, failing = results["failures"]
    assert off["what"] == "off, forward, tiny, ours"
    assert failing["error"] == "ValueError: no such op"
    assert "_failing" in failing["traceback"]


def _off_in_the_kernel(**inputs):
    y = modulated_layer_norm(**inputs)
    return y if dispatch.forced() == "reference" else 1.02 * y


def _failing(**inputs):
    raise ValueError("no such op")


def test_evaluation_on_the_cpu(tmp_path, monkeypatch):
    arguments = (
        "--dtype float32 --size tiny --seconds 0.3 --prompt 0.2 --batch 2 --packed 80 "
        "--columns eager ours fp8 --rounds 2"
    )
    row, ragged = run(evaluation, arguments, tmp_path / "evaluation.json", monkeypatch)["rows"]
    assert ragged["frames"] == sum(ragged["lengths"]) == 80
    for each in (row, ragged):
        assert each["ms"].keys() == {"eager", "ours", "fp8"}
        assert max(each["errors"]["plain"], each["errors"]["ours"]) <= 1e-5
        assert 1e-3 < each["errors"]["fp8"] <= 0.05
    parts = row["library"]["parts"]
    assert row["library"]["ms"] == pytest.approx(sum(part["ms"] for part in parts.values()))
    assert row["kernels"]["count"] > 50
    assert sum(kernel["share"] for kernel in row["kernels"]["top"]) <= 1.001


def test_products_and_attention_are_the_flops_of_an_evaluation():
    """But for the position convolutions, 1.3 % of them."""
    model, _ = workload.build("f5_base", torch.device("meta"), torch.bfloat16)
    sizes = evaluation.products(model.config).values()
    flops = sum(2 * 1250 * inputs * outputs * count for inputs, outputs, count in sizes)
    flops += model.config.depth * 4 * 1250**2 * model.config.dim
    floor = workload.floor(model, [1250], 1, Ceilings(1e12, 1e30)) * 1e9
    assert flops == pytest.approx(floor, rel=0.02)
    assert flops < floor


TINY = "--dtype float32 --size tiny --seconds 0.2 0.5 --frames 120 --columns eager ours --rounds 1"


def test_rollout_on_the_cpu(tmp_path, monkeypatch):
    arguments = TINY.replace("eager ours", "eager ours packed fp8")
    with pytest.warns(RuntimeWarning, match="no layer is in FP8"):
        results = run(rollout, f"{arguments} --nfe 2", tmp_path / "rollout.json", monkeypatch)
    (row,) = results["rows"]
    assert row["ms"].keys() == {"eager", "ours", "packed", "fp8"}
    assert row["frames"] == sum(row["lengths"]) == 120
    assert row["padded_frames"] == row["rows"] * max(row["lengths"])
    assert max(*row["errors"]["ours"], *row["errors"]["packed"]) <= 1e-5


def test_training_on_the_cpu(tmp_path, monkeypatch):
    arguments = f"{TINY} --nfe 0 2"
    rows = run(training, arguments, tmp_path / "training.json", monkeypatch)["rows"]
    assert [(row["nfe"], row["checkpointing"]) for row in rows] == [
        (0, False),
        (2, False),
        (0, True),
        (2, True),
    ]
    for row in rows:
        assert row["ms"].keys() == row["plain_steps"].keys() == {"eager", "ours"}
        assert max(row["errors"].values()) <= 1e-4


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
        assert count.count(lambda length=length: chain(length)).held == pytest.approx(
            (length + 2) * x.nbytes, rel=1e-3
        )


def test_the_plain_model_is_the_model():
    """A ragged guided batch, and one graph under torch.compile, also from step tables."""
    model, _ = workload.build("tiny", torch.device("cpu"), torch.float32)
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
            assert workload.error(got, want) <= 1e-5
    assert len(graphs) == 1


def test_what_runs_on_a_gpu_is_understood():
    for command in (*gpu.BRIEF.values(), *gpu.FULL.values()):
        _, name, options = gpu.parts(command)
        importlib.import_module(f"benchmarks.{name}").parser().parse_args(options)


def test_what_fails_on_a_gpu_does_not_stop_the_rest(tmp_path, monkeypatch):
    tiny = "ops --sizes tiny --columns plain --ops ragged_copy"
    monkeypatch.setattr(gpu, "BRIEF", {"first": "ops --sizes unknown", "second": tiny})
    arguments = ["gpu", "--out", str(tmp_path), "--device", "cpu", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", [*arguments, "--commit", "abc"])
    assert gpu.main() == 1
    assert [path.name for path in tmp_path.iterdir()] == ["second.json"]
    results = json.loads((tmp_path / "second.json").read_text())
    assert results["commit"] == "abc"
    assert len(results["rows"]) == 1


def test_a_wrong_contender_gets_no_ratio():
    row = {
        "model": "tiny",
        "nfe": 1,
        "batch": 1,
        "seconds": 1.0,
        "prompt": 0.0,
        "prepare": "inside",
        "floor_ms": 0.5,
        "wrong": ["ours"],
        "ms": {"eager": {"median": 2.0}, "ours": {"median": 1.0}},
    }
    printed = solver_graphs.line(row)
    assert "WRONG" in printed
    assert "2.000  1.00x    4.0f" in printed
    assert "2.00x" not in printed


def test_floor_of_an_f5_base_evaluation():
    """0.61 TFLOP at 10 s generated after a 3.3 s prompt, 378 MB of weights in bf16."""
    model, _ = workload.build("f5_base", torch.device("meta"), torch.bfloat16)
    flops = workload.floor(model, [1250], 1, Ceilings(1e12, 1e30))
    assert flops == pytest.approx(610, rel=0.03)
    weights = workload.floor(model, [1], 1, Ceilings(1e30, 1e9))
    assert weights == pytest.approx(378, rel=0.03)


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
    times = timing.on_device(contenders, torch.device("cuda"), rounds=3)
    assert {name: taken.median for name, taken in times.items()} == {0.5: 0.5, 3.0: 3.0}


def test_operations_of_an_evaluation(tmp_path):
    """At most 8 a block and 210 in all at the depth of F5 base; the count is exact."""
    out = tmp_path / "count.json"
    command = [sys.executable, "-m", "benchmarks.count", "--dim", "64", "--out", str(out)]
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
        assert row["names"]["imf_kernels.attention.default"] == blocks

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
