import subprocess
import sys

import pytest
import torch

import imf_kernels
from imf_kernels import backend, backends, dispatch

X = torch.zeros(1, 2, 3)


def test_scopes_nest_and_end():
    assert backends()["forced"] == dispatch._from_environment
    with backend("reference"):
        with backend("auto"):
            assert backends()["forced"] == "auto"
        assert backends()["forced"] == "reference"
        assert not dispatch.use_kernel(X, cpp=True)
    assert backends()["forced"] == dispatch._from_environment


def test_a_scope_ends_with_an_error():
    with pytest.raises(KeyError), backend("reference"):
        raise KeyError
    assert backends()["forced"] == dispatch._from_environment


def test_unknown_backends_are_named():
    with (
        pytest.raises(ValueError, match=r"backend: expected one of .*, got 'cuda'"),
        backend("cuda"),
    ):
        pass


def test_a_backend_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_EXTENSION", False)
    with backend("cpp"), pytest.raises(RuntimeError, match="C\\+\\+ extension"):
        dispatch.use_kernel(X, cpp=True)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with backend("triton"), pytest.raises(RuntimeError, match="'triton' needs"):
        dispatch.use_kernel(X)


def run(code, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_environment_chooses_for_a_process():
    code = "import imf_kernels; print(imf_kernels.backends()['forced'])"
    assert run(code, IMF_KERNELS_BACKEND="reference").stdout.strip() == "reference"
    wrong = run(code, IMF_KERNELS_BACKEND="fast").stderr
    assert "IMF_KERNELS_BACKEND: expected one of auto, reference, cpp, triton, got 'fast'" in wrong


def test_an_extension_that_does_not_load_is_said_once(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: _ZN2at")

    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(dispatch.importlib, "import_module", broken)
    with pytest.warns(RuntimeWarning, match="without its C\\+\\+ extension.*undefined symbol"):
        assert not dispatch._load_extension()


def test_triton_that_does_not_start_leaves_the_reference(monkeypatch):
    def broken(name):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setattr(dispatch.importlib, "import_module", broken)
    with pytest.warns(RuntimeWarning, match="reference: Triton does not start.*C compiler"):
        assert not dispatch._triton_starts.__wrapped__()


def test_version_is_said():
    assert imf_kernels.__version__.count(".") == 2
