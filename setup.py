"""Builds the optional C++ extension imf_kernels._C with CMake; pyproject.toml holds all the rest.

The build needs torch (so: `--no-build-isolation`), CMake >= 3.26, a C++ compiler and Python's
headers. Where one of them is missing or the build fails, the package is installed as pure Python
and says so.

    IMF_KERNELS_NO_EXT=1    pure Python, whatever is there
    IMF_KERNELS_EXT=1       an extension that cannot be built is an error
    IMF_KERNELS_CUDA=1      so is one without CUDA; =0 leaves CUDA out

CUDA is built in where torch is a CUDA build and its toolkit's nvcc is found (CUDACXX, CUDA_HOME,
PATH, /usr/local/cuda); a GPU is not needed. CMAKE_ARGS is passed on.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

NAME = "imf_kernels._C"

# CMake and Ninja from PyPI lie beside the interpreter, whether or not its environment is activated.
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


class CannotBuild(SetupError):
    """Why there will be no extension."""


class CMakeBuild(build_ext):
    no_cuda = ""
    """Why the extension is without CUDA, or nothing."""

    def run(self) -> None:
        no_ext = _is_set("IMF_KERNELS_NO_EXT")
        must_build = _is_set("IMF_KERNELS_EXT") or _is_set("IMF_KERNELS_CUDA")
        if no_ext and must_build:
            raise SetupError("IMF_KERNELS_NO_EXT is set, and IMF_KERNELS_EXT or IMF_KERNELS_CUDA")
        inplace = self.inplace
        try:
            if no_ext:
                raise CannotBuild("IMF_KERNELS_NO_EXT is set")
            super().run()
            cuda = "host only" if self.no_cuda else "with CUDA"
            print(f"imf_kernels: C++ extension built, {cuda}", flush=True)
        except CannotBuild as reason:
            if must_build:
                raise
            self._leave_out(inplace)
            print(f"imf_kernels: PURE PYTHON, no C++ extension: {reason}", flush=True)

    def build_extension(self, ext: Extension) -> None:
        torch = importlib.util.find_spec("torch")
        if torch is None or torch.origin is None:
            raise CannotBuild("no torch in the build environment (give pip --no-build-isolation)")
        if not any(shutil.which(name, path=PATH) for name in _compilers()):
            raise CannotBuild(f"no C++ compiler found (looked for {', '.join(_compilers())})")
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            raise CannotBuild("no Python.h found (on Debian and Ubuntu it comes with python3-dev)")

        root = Path(torch.origin).parent
        nvcc, self.no_cuda = _nvcc(root)
        if self.no_cuda:
            if _is_set("IMF_KERNELS_CUDA"):
                raise CannotBuild(f"IMF_KERNELS_CUDA is set, but {self.no_cuda}")
            print(f"imf_kernels: no CUDA in the extension: {self.no_cuda}", flush=True)
        build = Path(self.build_temp).resolve()
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        _cmake(
            "--fresh",
            f"-S{Path(__file__).parent}",
            f"-B{build}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTORCH_ROOT={root}",
            f"-DIMF_CUDA={'OFF' if self.no_cuda else 'ON'}",
            *([] if self.no_cuda else [f"-DCMAKE_CUDA_COMPILER={nvcc}"]),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={library.parent}",
        )
        _cmake("--build", build, "--parallel")

    def _leave_out(self, inplace: bool) -> None:
        """Go on without the extension, and without the one that an earlier build may have left."""
        for root in [self.build_lib, "."] if inplace else [self.build_lib]:
            Path(root, self.get_ext_filename(NAME)).unlink(missing_ok=True)
        self.extensions = self.distribution.ext_modules = []
        # It chose a platform tag while it still expected an extension.
        self.get_finalized_command("bdist_wheel").root_is_pure = True


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def _nvcc(torch: Path) -> tuple[str, str]:
    """The CUDA compiler that fits the installed torch, or else why there will be no CUDA."""
    if os.environ.get("IMF_KERNELS_CUDA") == "0":
        return "", "IMF_KERNELS_CUDA is 0"
    wanted = re.search(r"^cuda\b.*= '(\d+)", (torch / "version.py").read_text(), re.MULTILINE)
    if wanted is None:
        return "", "torch is not a CUDA build"
    homes = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", "")]
    places = [*(str(Path(home, "bin")) for home in homes if home), PATH, "/usr/local/cuda/bin"]
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc", path=os.pathsep.join(places))
    if not nvcc:
        return "", "nvcc not found"
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)", printed)
    if found is None or found[1] != wanted[1]:
        return "", f"torch is built for CUDA {wanted[1]}, {nvcc} is of {found and found[1]}"
    return nvcc, ""


def _compilers() -> list[str]:
    return shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]


def _cmake(*args: str | Path) -> None:
    program = shutil.which("cmake", path=PATH)
    if program is None:
        raise CannotBuild("CMake not found")
    env = {**os.environ, "PATH": PATH}
    if shutil.which("ninja", path=PATH):
        env.setdefault("CMAKE_GENERATOR", "Ninja")
    try:
        subprocess.run([program, *args], check=True, env=env)
    except (subprocess.CalledProcessError, OSError) as error:
        raise CannotBuild("the build failed, see the errors above") from error


setup(
    ext_modules=[Extension(NAME, ["CMakeLists.txt", *sorted(glob.glob("csrc/*"))])],
    cmdclass={"build_ext": CMakeBuild},
)
