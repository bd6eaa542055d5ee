"""Builds the optional C++ extension imf_kernels._C with CMake; pyproject.toml holds all the rest.

The build needs torch (so: `--no-build-isolation`), CMake >= 3.26 and a C++ compiler. Where one of
them is missing or the build fails, the package is installed as pure Python and says so.

    IMF_KERNELS_NO_EXT=1    pure Python, whatever is there
    IMF_KERNELS_EXT=1       an extension that cannot be built is an error
"""

from __future__ import annotations

import glob
import importlib.util
import os
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
    def run(self) -> None:
        no_ext, must_build = _is_set("IMF_KERNELS_NO_EXT"), _is_set("IMF_KERNELS_EXT")
        if no_ext and must_build:
            raise SetupError("IMF_KERNELS_NO_EXT and IMF_KERNELS_EXT are both set")
        inplace = self.inplace
        try:
            if no_ext:
                raise CannotBuild("IMF_KERNELS_NO_EXT is set")
            super().run()
            print("imf_kernels: C++ extension built", flush=True)
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

        build = Path(self.build_temp).resolve()
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        _cmake(
            "--fresh",
            f"-S{Path(__file__).parent}",
            f"-B{build}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTORCH_ROOT={Path(torch.origin).parent}",
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
