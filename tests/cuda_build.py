"""Builds the extension against a CUDA build of torch, without a GPU, and checks how it links.

The build needs nvcc and torch's headers and libraries: an installed CUDA build, else those of its
wheel, fetched and unpacked once into `build/torch-cuda` (530 MB; nothing of it is installed).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).parents[1]
WHEEL = "torch==2.12.1"
"""The latest whose usual wheel is a CUDA 13 build also where 2.13 is at hand as a CPU one."""
SYSTEM = ("libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2")


class CannotCheck(Exception):
    """Why there is nothing to check here."""


def toolkit() -> Path:
    """The CUDA toolkit's folder."""
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and Path(home, "bin/nvcc").exists():
            return Path(home)
    raise CannotCheck("no nvcc in CUDA_HOME or /usr/local/cuda")


def cuda_torch(seconds: int) -> Path:
    """The package folder of a CUDA build of torch."""
    if torch.version.cuda:
        return Path(torch.__file__).parent
    folder = ROOT / "build" / "torch-cuda" / WHEEL
    if not (folder / "torch" / "version.py").exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL]
        try:
            subprocess.run([*pip, "--dest", folder], check=True, timeout=seconds)
        except (subprocess.SubprocessError, OSError) as error:
            raise CannotCheck(f"the wheel of {WHEEL} could not be fetched: {error}") from error
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            wanted = ("torch/include/", "torch/lib/", "torch/version.py")
            names = [name for name in archive.namelist() if name.startswith(wanted)]
            archive.extractall(folder, sorted(names, key="torch/version.py".__eq__))
        wheel.unlink()
    version = (folder / "torch" / "version.py").read_text()
    if "cuda: Optional[str] = None" in version:
        raise CannotCheck(f"the wheel of {WHEEL} at hand is not a CUDA build")
    return folder / "torch"


def build(torch_root: Path, cuda: Path, folder: Path) -> Path:
    """Configure and build with CMake; returns the extension."""
    scripts = sysconfig.get_path("scripts")
    env = {**os.environ, "PATH": os.pathsep.join([scripts, os.environ["PATH"]])}
    configure = [
        "cmake",
        "-GNinja",
        f"-S{ROOT}",
        f"-B{folder}",
        "-DIMF_CUDA=ON",
        f"-DTORCH_ROOT={torch_root}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_CUDA_COMPILER={cuda / 'bin/nvcc'}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder / 'out'}",
    ]
    for command in (configure, ["cmake", "--build", folder]):
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in done.stdout, done.stdout
    (extension,) = (folder / "out").glob("_C*.so")
    return extension


def symbols(library: Path, which: str) -> set[str]:
    """Names, without versions, of a library's "--defined-only" or "--undefined-only" symbols."""
    command = ["nm", "--dynamic", "--format=posix", which, library]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = (line.split() for line in listed.splitlines())
    return {row[0].split("@")[0] for row in rows if row[1] not in "wv"}  # weak may be missing


def unresolved(extension: Path, torch_root: Path, cuda: Path) -> set[str]:
    """What the extension needs and none of the libraries it is loaded beside defines."""
    names = ("c10", "c10_cuda", "torch_cpu", "torch_cuda", "torch_python")
    libraries = [torch_root / "lib" / f"lib{name}.so" for name in names]
    libraries += [*(torch_root / "lib").glob("libgomp*"), cuda / "lib64" / "libcudart.so"]
    libraries += [found for name in SYSTEM for found in _system(name)]
    defined = set().union(*(symbols(library, "--defined-only") for library in libraries))
    python = {
        name for name in symbols(extension, "--undefined-only") if name.startswith(("Py", "_Py"))
    }
    return symbols(extension, "--undefined-only") - defined - python


def resources(extension: Path) -> list[dict[str, int]]:
    """Registers, stack and the like of every CUDA kernel for every architecture."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "--dump-resource-usage", extension]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"REG:.*", printed)
    return [{k: int(v) for k, v in re.findall(r"([A-Z]+)(?:\[0\])?:(\d+)", line)} for line in lines]


def _system(name: str) -> list[Path]:
    found = subprocess.run(
        [os.environ.get("CC", "gcc"), f"-print-file-name={name}"], capture_output=True, text=True
    )
    path = Path(found.stdout.strip())
    return [path] if path.is_absolute() else []
