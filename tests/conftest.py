"""Kernels run under the Triton interpreter where there is no CUDA device."""

import os
from pathlib import Path

import torch

if not torch.cuda.is_available():
    # read when a kernel is decorated, so before the package is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

ON_DEVICE = Path(__file__).parent / "ops"
"""Tests that run on whatever device there is: on a CUDA machine they are GPU tests too."""


def pytest_report_header():
    from imf_kernels import backends

    installed = backends()
    extension = "with the C++ extension" if installed["cpp"] else "pure Python, no C++ extension"
    return f"imf_kernels: {extension}; {installed}"


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if torch.cuda.is_available() and item.path.is_relative_to(ON_DEVICE):
            item.add_marker(pytest.mark.gpu)
        elif not torch.cuda.is_available() and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
