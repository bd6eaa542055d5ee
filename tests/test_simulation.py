"""Operations are counted as they are, and simulated cards have the resources that they have."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import launches
from benchmarks.operations import Operation, Recording, count
from benchmarks.timing import Ceilings
from imf_kernels import dispatch
from imf_kernels.ops import rope_qkv
from imf_kernels.rows import Rows

# -- operations -----------------------------------------------------------------------------------


def recorded(run):
    with Recording() as seen:
        run()
    return seen.operations


def test_an_operation_reads_and_writes():
    x, y = torch.randn(3, 4), torch.randn(4, 5)
    (product,) = recorded(lambda: x @ y)
    assert product == Operation("aten.mm", 2 * 3 * 4 * 5, 4 * (12 + 20 + 15), ((3, 4), (4, 5)))
    (added,) = recorded(lambda: x.add_(1.0))
    assert added.nbytes == 2 * x.nbytes
    assert recorded(lambda: x.view(2, 6)[0].unflatten(0, (2, 3)).transpose(0, 1)) == []


@pytest.mark.parametrize(("heads", "touched"), [(1, 1), (4, 4)])
def test_rope_in_place_touches_its_heads_of_q_and_k(heads, touched):
    qkv, rope = torch.randn(6, 3, 4, 8), torch.randn(3, 8)
    rows = Rows.padded(torch.tensor([3, 2]), 3)
    (one,) = recorded(lambda: rope_qkv(qkv, rope, rows, heads, in_place=True))
    assert one.nbytes == rope.nbytes + 2 * 6 * 2 * touched * 8 * 4


def test_an_embedding_reads_the_rows_asked_for():
    weight, ids = torch.randn(1000, 8), torch.tensor([3, 3, 999])
    (one,) = recorded(lambda: torch.nn.functional.embedding(ids, weight))
    assert one.nbytes == ids.nbytes + 2 * 3 * 8 * 4


def test_what_is_freed_is_held_no_more():
    def run():
        for _ in range(3):
            torch.ones(1000)

    assert count(run).held == 4000


def test_operations_beside_their_floors():
    """Those within an operation are its own; sums are those of the whole call."""
    a, b = torch.randn(2, 64, 64).unbind()

    def run():
        return torch.softmax(a @ b, -1) @ b

    rows = launches.by_operation(run, torch.device("cpu"), Ceilings(flops=1e12, bandwidth=1e9))
    found = {row["name"]: row for row in rows}
    assert {name: row["count"] for name, row in found.items()} == {"aten.mm": 2, "aten._softmax": 1}
    assert found["aten.mm"]["floor"] == pytest.approx(1e6 * 2 * 3 * a.nbytes / 1e9)
    assert all(row["us"] > 0 for row in rows)
    assert rows == sorted(rows, key=lambda row: -row["us"])


# -- cards ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulate():
    if not dispatch.HAS_TRITON:
        pytest.skip("triton is not installed")
    from benchmarks import simulate

    return simulate


def test_blocks_of_a_multiprocessor(simulate):
    """By registers, by warps, by their number, by shared memory."""
    h200, a100 = simulate.CARDS["H200"], simulate.CARDS["A100"]

    def resident(warps, registers, shared, card=h200):
        return simulate.Kernel("k", 1, warps, registers, shared).resident(card)

    assert resident(8, 128, 0) == 2  # 8 warps of 128 registers are half of all
    assert resident(8, 129, 0) == 1  # given by 8 a thread
    assert resident(16, 32, 0) == 4
    assert resident(1, 32, 0) == 32
    assert resident(1, 96, 0) == 20  # five on each of four parts
    assert resident(4, 32, 100 * 1024) == 2
    assert resident(4, 32, 100 * 1024, a100) == 1


def test_a_product_is_whole_waves_of_tiles(simulate):
    card = simulate.CARDS["H200"]
    wave = 2 * 128 * 128 * 1024 * card.multiprocessors / card.flops

    def tiled(m, n, split=1):
        return simulate._tiled((m, 1024, n), (128, 128), split, card)

    assert tiled(128, 128) == (pytest.approx(wave), 1)
    assert tiled(128 * 132, 128) == (pytest.approx(wave), 1)
    assert tiled(128 * 132 + 1, 128) == (pytest.approx(2 * wave), 1)
    sums = 8 * 4 * 128 * 128 / card.bandwidth
    assert tiled(128, 128, split=4) == (pytest.approx(wave / 4 + sums), 2)  # another kernel adds


def test_operations_on_a_card(simulate):
    card = simulate.CARDS["H200"]
    copy = simulate.timed(Operation("aten.copy", 0, 43_000_000, ()), (), card)
    assert copy.floor == copy.waves == pytest.approx(1e-5)
    assert copy.launches == 1
    flops = 79 * 10**9
    most = simulate.Kernel("attention", 176, 8, 128, 0)  # two for some, of which three fourths
    attention = simulate.timed(Operation("imf_kernels.attention", flops, 0, ()), (most,), card)
    assert attention.floor == pytest.approx(1e-4)
    assert attention.waves == pytest.approx(264 / 176 * 1e-4 / simulate.OF_KERNELS)
    shapes = (8, 8), (8,)
    filled = simulate.timed(Operation("aten.masked_fill", 0, 0, shapes), (), card)
    assert filled.launches == 2
    row, other = simulate.grouped([copy, attention, copy], card)
    assert (row["operation"], row["bound"], row["blocks"], row["resident"]) == (
        "imf_kernels.attention",
        "FLOPs",
        [176],
        [2],
    )
    assert (other["count"], other["bytes"], other["launched"]) == (2, 86_000_000, 24.0)
    assert simulate.total([row, other])["launches"] == 3


SIMULATED = """
import json, torch
from benchmarks import simulate
from benchmarks.operations import count
from benchmarks.workload import build

model, _ = build("tiny", torch.device("cpu"), torch.bfloat16)
run = simulate.solve(model, 20, 5)
with torch.no_grad(), simulate.Dry(simulate.CARDS["H200"]) as dry:
    run()
rows = simulate.grouped(dry.timed(), dry.card)
print(json.dumps(rows))
"""


def test_a_solve_is_simulated(simulate):
    """In a process of its own: the interpreter is chosen when kernels are decorated."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SIMULATED]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    launched = {row["operation"]: row["launches"] for row in rows if row["blocks"]}
    assert launched["imf_kernels.attention"] == 3 * 2  # steps, blocks
    assert launched["imf_kernels.guided_euler_step"] == 3
    assert all(r["floor"] <= r["waves"] < r["launched"] for r in rows)
    assert all(resident >= 1 for row in rows for resident in row["resident"])
