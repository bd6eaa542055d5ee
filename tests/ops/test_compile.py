"""Every kernel compiles for sm_80 and sm_90, without spills, in the forms that models use."""

import itertools
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from imf_kernels import dispatch

OPS = {
    "attention",
    "causal_conv",
    "depthwise_conv",
    "grn_gelu",
    "grouped_conv",
    "guided_euler_step",
    "mean_velocity_loss",
    "modulated_layer_norm",
    "rope_qkv",
}
FP8 = {"quantize_rows"}
"""Kernels that only write FP8, which sm_80 does not have."""
ELSEWHERE = {"ragged_copy", "linear", "fp8_linear", "cached_attention"}
"""CUDA C++ (tests/test_build.py), the libraries' matrix products, attention's own kernel."""
SPILLS = {"3.6": 16, "3.7": 16}
"""Bytes that a Triton's assembler keeps of a few kernels; others none."""
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}


def spilled():
    return SPILLS.get(".".join(metadata.version("triton").split(".")[:2]), 0)


@pytest.fixture(scope="module")
def records():
    return compiled()


def compiled(*options, **environment):
    if not dispatch.HAS_TRITON:
        pytest.skip("triton is not installed")
    # a process of its own: the interpreter is chosen when a kernel is decorated
    environment |= {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.aot", *options],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_every_op_is_compiled_for_both_architectures(records):
    files = {path.stem for path in (Path(dispatch.__file__).parent / "ops").glob("[a-z]*.py")}
    assert files == OPS | FP8 | ELSEWHERE
    compiled = {(r["op"], r["architecture"]) for r in records}
    assert compiled == {*itertools.product(OPS, ("sm_80", "sm_90")), *((op, "sm_90") for op in FP8)}


def test_no_kernel_spills(records):
    assert all(r["reg"] > 0 for r in records)
    assert [r for r in records if r["stack"] > spilled() or r["local"] > 0] == []
    assert [r for r in records if r["shared"] > SHARED[r["architecture"]]] == []


def test_loads_are_vectorised(records):
    """16 bytes a thread where rows are aligned: C = 80, and D a multiple of 256."""
    aligned = [r for r in records if r["form"].startswith(("C=80", "D=1024"))]
    assert aligned
    assert [r for r in aligned if r["vector_bits"] < 128] == []


def test_kernels_wait_when_they_are_launched_early(records):
    assert not any(r["waits"] for r in records)
    early = compiled("--brief", IMF_KERNELS_PDL="1")
    assert {(r["op"], r["kernel"]) for r in early} == {(r["op"], r["kernel"]) for r in records}
    assert all(r["waits"] and r["stack"] <= spilled() for r in early)
