"""The house: imports go down only, and importing the package costs and touches nothing."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import imf_kernels

PACKAGE = Path(imf_kernels.__file__).parent
FLOORS = {
    "checks": 0,
    "dispatch": 0,
    "files": 0,
    "masks": 0,
    "profiling": 0,
    "rows": 0,
    "seeds": 0,
    "version": 0,
    "ops": 1,
    "models": 2,
    "guidance": 2,
    "grids": 2,
    "solver": 3,
    "teacher": 3,
    "sampler": 3,
    "metrics": 3,
    "data": 3,
    "objectives": 3,
    "distill": 4,
    "evaluate": 4,
    "export": 4,
    "fp8": 4,
    "graphs": 4,
    "hosts": 5,
    "o3s": 4,
    "streaming": 4,
}
ALWAYS_ALLOWED = {"torch", "imf_kernels", *sys.stdlib_module_names}
ALLOWED = {"ops": {"triton"}}
LAZY = {
    "accelerate",
    "f5_tts",
    "faster_whisper",
    "huggingface_hub",
    "jiwer",
    "librosa",
    "matplotlib",
    "numpy",
    "nvtx",
    "onnxruntime",
    "peft",
    "pyarrow",
    "rich",
    "safetensors",
    "soundfile",
    "soxr",
    "transformers",
    "yaml",
    "zhconv",
    "zhon",
}
"""May be imported inside a function only."""


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(name: str) -> str:
    """`imf_kernels.ops.rope_qkv` lives in `ops`."""
    return name.split(".")[1]


def imports(path: Path):
    """Every imported module's full name, and whether it is imported at import time."""
    tree = ast.parse(path.read_text())
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [node.module]
            if node.module == "imf_kernels":
                names = [f"imf_kernels.{alias.name}" for alias in node.names]
        for name in names:
            yield name, id(node) not in inner


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    here = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert here in FLOORS, f"give {here} a floor"
    for name, at_import in imports(path):
        top = name.split(".")[0]
        if top == "imf_kernels":
            assert FLOORS[room(name)] <= FLOORS[here], f"{here} imports {name}, a floor above"
        else:
            allowed = ALWAYS_ALLOWED | ALLOWED.get(here, set())
            assert top in allowed or (top in LAZY and not at_import), f"{here} imports {name}"


def run(code: str) -> dict:
    command = [sys.executable, "-c", code]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def test_import_is_light():
    found = run(
        "import json, sys, time, torch\n"
        "before, start = set(sys.modules), time.process_time()\n"
        "import imf_kernels\n"
        "seconds = time.process_time() - start\n"
        "print(json.dumps({'cuda': torch.cuda.is_initialized(), 'seconds': seconds,\n"
        "    'new': sorted({m.split('.')[0] for m in set(sys.modules) - before})}))"
    )
    assert not found["cuda"]
    assert found["seconds"] < 3, "half a second of work, with slack"
    standard = {name for name in found["new"] if name in sys.stdlib_module_names or name[0] == "_"}
    third_party = set(found["new"]) - standard - {"imf_kernels", "triton"}
    assert not third_party - {"torch"}, third_party


def test_works_without_triton_and_without_the_extension():
    found = run(
        "import json, sys, torch\n"
        "sys.modules['triton'] = sys.modules['imf_kernels._C'] = None\n"
        "import imf_kernels\n"
        "step = imf_kernels.ops.guided_euler_step(\n"
        "    torch.zeros(1, 2, 3), torch.ones(2, 2, 3), torch.ones(1), 2.0)\n"
        "print(json.dumps({**imf_kernels.backends(), 'sum': step.x.sum().item()}))"
    )
    assert found == {
        "forced": "auto",
        "triton": False,
        "triton_interpreted": False,
        "cpp": False,
        "cpp_cuda": False,
        "attention": "sdpa",
        "sum": 6.0,
    }
