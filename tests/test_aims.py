"""The aims' figures are those of the rows that they name."""

import json

import numpy as np
import pytest

from benchmarks.report import aims
from benchmarks.report.aims import AIMS, Place
from benchmarks.report.results import Record, Row


def record(contender, seconds, **more):
    return Record("", "", {}, contender, "ours", np.array([seconds]), 0.0, 1.0, more)


def row(test, *records, **stated):
    return Row(test, {"model": "f5_base", **stated}, records, records[0])


def place(*rows, **others):
    known = {}
    for each in rows:
        known.setdefault(each.test, []).append(each)
    return Place(known, others)


def figure(what, *places):
    (aim,) = (aim for aim in AIMS if aim.what == what)
    cells = aim.cells({f"GPU {i}": each for i, each in enumerate(places)})
    return cells[3] if len(places) == 1 else cells[3:]


def solve(contender, seconds, **stated):
    told = {"nfe": 3, "batch": 1, "guidance": False, "seconds": 10.0, "prompt": 3.3}
    records = record("ours, graph", 0.005, audio_seconds=10.0), record(contender, seconds)
    return row("rtf", *records, **told | stated)


def test_how_many_times_as_fast():
    what = "3 steps, 10 s: as fast as F5-TTS's own sampler"
    assert figure(what, place(solve("F5-TTS", 0.02))) == "**4.00x**"
    assert figure(what, place(solve("F5-TTS", 0.019))) == "3.80x"
    for other in (
        solve("plain", 0.02),
        solve("F5-TTS", 0.02, depth=4),
        solve("F5-TTS", 0.02, nfe=1),
        solve("F5-TTS", 0.02, dtype="float32"),
    ):
        assert figure(what, place(other)) == "needs a GPU, F5-TTS"


def test_the_worst_row_counts():
    def op(name, ours, theirs):
        told = {"op": name, "size": "speech", "pass": "forward"}
        return row("ops", record("ours", ours), record("torch.compile", theirs), **told)

    found = place(op("guided_euler_step", 1.0, 2.0), op("grouped_conv_mish", 1.0, 1.1))
    assert figure("fused ops at speech sizes, in a graph: as fast as Inductor's", found) == (
        "**1.10x**"
    )
    told = "the guided step, grouped convolutions and RoPE among them"
    assert figure(told, found) == "1.10x"


def test_evaluations():
    floor = {"floor_seconds": 1e-3}
    alone = row(
        "evaluation", record("ours", 2e-3, library_seconds=1.8e-3, **floor), seconds=10.0, batch=1
    )
    packed = row(
        "evaluation", record("ours", 1.4e-3, **floor), record("ours, fp8", 0.9e-3), ragged=True
    )
    found = place(alone, packed)
    told = "one evaluation, 10 s after a prompt of 3.3 s: of its floor"
    assert figure(told, found) == "**2.00x**"
    told = "the same, of the best library's products and attention"
    assert figure(told, found) == "**1.11x**"
    assert figure("one evaluation of 16384 packed frames: of its floor", found) == "**1.40x**"
    assert figure("the same in FP8: of bfloat16's floor", found) == "**0.900x**"


def test_a_new_grid_is_what_it_takes_more():
    turning = record("ours, graph", 5.3e-3), record("ours, graph, one grid", 5.0e-3)
    assert figure("a new grid", place(row("grid", *turning))) == "300 µs"


def test_the_reference_device_has_an_aim_of_its_own():
    (aim,) = (aim for aim in AIMS if "RTF" in aim.what)
    found = place(row("rtf", record("ours, graph", 0.015, audio_seconds=10.0), **SOLVED))
    cells = aim.cells({"NVIDIA A100-SXM4-80GB": found, "NVIDIA H200": found})
    assert cells[1] == "at most 0.00060 (A100: 0.00200)"
    assert cells[3:] == ["**0.00150**", "0.00150"]


SOLVED = {"nfe": 3, "batch": 1, "guidance": False, "seconds": 10.0}


def test_costs_of_intervals_and_memory():
    def cost(part, run, seconds, nbytes=0):
        return {"part": part, "run": run, "rows": 1, "seconds": seconds, "bytes": nbytes}

    rows = [
        cost("teacher", "NFE 0", 1.0),
        cost("teacher", "NFE 8", 9.0),
        cost("targets", "8 targets", 8.0),
        cost("jvp", "IntMeanFlow, NFE 8", 1.0, 30),
        cost("jvp", "MeanFlow, jvp as published", 1.0, 100),
    ]
    found = place(distillation=rows)
    told = "8 intervals of a rollout of 8 sub-steps: plain updates for each (the paper 3.1 for one)"
    assert figure(told, found) == "2.00x"
    assert figure("the same, the rollout used 4 times", found) == "**1.25x**"
    told = "memory of an update: of MeanFlow's with a recorded JVP"
    assert figure(told, found) == "**30 %**"


@pytest.mark.parametrize("aim", AIMS, ids=lambda aim: aim.what)
def test_without_results_there_is_a_reason(aim):
    card = {"cases": [], "weights": {"baked": 0.5, "FP8": 0.2}}
    gpu, cpu, simulated = (place(), Place({}, {}, on_cpu=True), Place({}, {}, card))
    cells = aim.cells({"a GPU": gpu, "a CPU": cpu, "simulated": simulated})[3:]
    reason = f"needs {aim.needs}" if aim.needs else ""
    assert cells[:2] == ["" if aim.what.startswith("CPU") else reason, reason]
    counted = {"weights of a baked student: of the checkpoint's": "50 %", "the same in FP8": "20 %"}
    assert cells[2] == counted.get(aim.what, "")


def test_results_of_other_scripts_are_read(tmp_path):
    rows = [{"comparison": "equal, guided", "ratio": 1.2}, {"comparison": "default", "ratio": 21.0}]
    (tmp_path / "f5_sampler.json").write_text(json.dumps({"rows": rows}))
    found = Place.of(tmp_path, [])
    text = aims.section({"a CPU": found})
    assert "as fast as F5-TTS's own sampler | at least 1.15x | 1.25x | **1.20x** |" in text
    assert "against F5-TTS's 32 guided | at least 22.0x | 40.0x | 21.0x |" in text


def test_simulated_figures():
    case = {"what": "evaluation, 10 s after a prompt of 3.3 s", "launched": 20.0, "limit": 10.0}
    found = Place({}, {}, {"cases": [case], "weights": {"baked": 0.5, "FP8": 0.25}})
    told = "one evaluation, 10 s after a prompt of 3.3 s: of its floor"
    assert figure(told, found) == "2.00x"  # never bold
    assert figure("weights of a baked student: of the checkpoint's", found) == "50 %"
    assert figure("the same in FP8", found) == "25 %"
