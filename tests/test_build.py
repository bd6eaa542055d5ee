"""How the extension builds: with CUDA (no GPU needed), and what happens where it cannot."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from torch.utils import cpp_extension

from tests import cuda_build, pages


@pytest.mark.build
@pytest.mark.timeout(600)
def test_compiles_and_links_against_a_cuda_build_of_torch(tmp_path, record_property):
    try:
        cuda = cuda_build.toolkit()
        torch_root = cuda_build.cuda_torch(seconds=240)
    except cuda_build.CannotCheck as reason:
        pytest.skip(str(reason))
    start = time.perf_counter()
    extension = cuda_build.build(torch_root, cuda, tmp_path)
    print(f"built in {time.perf_counter() - start:.0f} s against {torch_root}")
    assert not cuda_build.unresolved(extension, torch_root, cuda)
    kernels = cuda_build.resources(extension)
    assert len(kernels) == 4, "two capacities, sm_80 and sm_90"
    assert all(kernel["STACK"] == kernel["LOCAL"] == 0 for kernel in kernels), kernels
    needed = cuda_build.symbols(extension, "--undefined-only")
    assert any("CUDAGraph" in name for name in needed), "the graph runtime is in it"
    assert any("cudaLaunchKernel" in name for name in needed), "so is the ragged copy"


@pytest.mark.build
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    "page", [page for page in pages.PAGES if pages.blocks(page, "cpp")], ids=pages.name
)
def test_cpp_of_the_documents_compiles(page):
    for block in pages.blocks(page, "cpp"):
        command = ["c++", "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
        folders = [f"-I{folder}" for folder in cpp_extension.include_paths()]
        subprocess.run([*command, *folders], input=block, text=True, check=True)


def setup(tmp_path, **environment):
    command = ["setup.py", "build_ext", f"--build-temp={tmp_path}", f"--build-lib={tmp_path}"]
    return subprocess.run(
        [sys.executable, *command],
        cwd=cuda_build.ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="needs setuptools")
class TestSetup:
    @pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
    @pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
    def test_cuda_that_was_asked_for_and_cannot_be_had_is_an_error(self, tmp_path):
        done = setup(tmp_path, IMF_KERNELS_CUDA="1")
        assert done.returncode != 0
        assert "IMF_KERNELS_CUDA is set, but torch is not a CUDA build" in done.stderr

    def test_pure_python_is_said(self, tmp_path):
        done = setup(tmp_path, IMF_KERNELS_NO_EXT="1")
        assert done.returncode == 0, done.stderr
        assert "PURE PYTHON, no C++ extension: IMF_KERNELS_NO_EXT is set" in done.stdout
        assert not list(tmp_path.rglob("*.so"))

    @pytest.mark.parametrize("wanted", ["IMF_KERNELS_EXT", "IMF_KERNELS_CUDA"])
    def test_contradictions_are_errors(self, tmp_path, wanted):
        done = setup(tmp_path, IMF_KERNELS_NO_EXT="1", **{wanted: "1"})
        assert done.returncode != 0
        assert "IMF_KERNELS_NO_EXT is set" in done.stderr
