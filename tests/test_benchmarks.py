"""The benchmarks run and report what they say they do; no figure is asserted."""

import json

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
