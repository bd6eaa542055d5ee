"""The benchmarks run and report what they say they do; no figure is asserted."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from benchmarks import solver_graphs
from benchmarks.timing import Ceilings, interleaved


def test_solver_graphs_on_the_cpu(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "solver_graphs.json"
    arguments = (
        "--device cpu --dtype float32 --models tiny --seconds 0.3 --prompt 0 0.2 --batch 1 2 "
        f"--nfe 1 2 --columns eager ours --rounds 2 --out {out}"
    )
    monkeypatch.setattr("sys.argv", ["solver_graphs", *arguments.split()])
    solver_graphs.main()
    results = json.loads(out.read_text())
    assert len(results["solves"]) == 2 * 2 * 2 * 2
    for row in results["solves"]:
        assert set(row["ms"]) == set(row["errors"]) == {"eager", "ours"}
        assert row["wrong"] == []
        assert 0 < row["ms"]["ours"]["low"] <= row["ms"]["ours"]["median"]
        assert row["floor_ms"] > 0
        assert row["errors"]["eager"] <= 1e-5
    assert {row["prepare"] for row in results["solves"]} == {"inside", "outside"}
    assert set(results["new_grid_ms"]) == {"tiny, NFE 2"}
    assert results["command"].startswith("python -m benchmarks.solver_graphs --device cpu")
    assert "ours" in capsys.readouterr().out


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
    model, _ = solver_graphs.build("f5_base", torch.device("meta"), torch.bfloat16)
    flops = solver_graphs.floor(model, 1, 1250, 1, Ceilings(1e12, 1e30))
    assert flops == pytest.approx(610, rel=0.03)
    weights = solver_graphs.floor(model, 1, 1, 1, Ceilings(1e30, 1e9))
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


def test_operations_of_an_evaluation(tmp_path):
    """At most 8 a block and 210 in all, at the depth of F5 base; the count is exact."""
    out = tmp_path / "count.json"
    command = [sys.executable, "-m", "benchmarks.count", "--dim", "64", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = {k: v for k, v in json.loads(out.read_text()).items() if v is not None}
    ours = {name: row for name, row in rows.items() if "own" not in name}
    assert len(ours) == 6
    for row in ours.values():
        assert row["a block"] <= 8
        assert row["operations"] <= 210
        assert row["names"]["imf_kernels.attention.default"] == 22


def test_flops_of_an_evaluation():
    """Counted and derived FLOPs agree: 0.61 TFLOP at F5 base's sizes and 10 s after a prompt."""
    code = (
        "from benchmarks.count import ours; "
        "print(ours('f5_v1', False, 1250, dim=1024, depth=22, heads=16).flops)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) == pytest.approx(0.61e12, rel=0.03)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("f5_tts", "torchdiffeq")),
    reason="f5-tts is not installed (make bench-cpu)",
)
def test_f5_sampler(tmp_path, monkeypatch):
    from benchmarks import f5_sampler

    out = tmp_path / "f5_sampler.json"
    arguments = f"--size tiny --seconds 0.5 --nfe 5 --rounds 2 --out {out}"
    monkeypatch.setattr("sys.argv", ["f5_sampler", *arguments.split()])
    threads = torch.get_num_threads()
    f5_sampler.main()
    torch.set_num_threads(threads)
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 3
    assert all(row["max_abs_difference"] <= 1e-4 for row in rows[:2])
    assert all(row["ratio"] > 0 for row in rows)
