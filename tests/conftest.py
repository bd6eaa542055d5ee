"""Kernels run under the Triton interpreter where there is no CUDA device."""

import os

import torch

if not torch.cuda.is_available():
    # read when a kernel is decorated, so before the package is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
