import pytest

from imf_kernels.graphs import runtime
from tests.graphs.tape import TapeSlot


@pytest.fixture
def taped(monkeypatch):
    """Samplers and teachers on the CPU go through the whole machinery of graphs."""
    monkeypatch.setattr(runtime, "slot_on", TapeSlot)


@pytest.fixture(params=["graphs", "eager"])
def either(request):
    """The machinery of graphs, and what a machine without CUDA runs."""
    if request.param == "graphs":
        request.getfixturevalue("taped")
    return request.param
