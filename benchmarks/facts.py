"""What every result file holds: the machine, versions and command; its rows; and what failed."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import imf_kernels
from imf_kernels.files import replacing

PACKAGES = (
    "torch",
    "triton",
    "flash-attn",
    "f5-tts",
    "torchdiffeq",
    "x-transformers",
    "vocos",
    "onnxruntime",
    "pytest-benchmark",
)


def parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that all scripts share."""
    found = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    found.add_argument("--rounds", type=int, default=rounds)
    found.add_argument("--commit", help="of the code; by default what git says")
    found.add_argument("--out", type=Path, help="a JSON file for the results")
    return found


def facts(
    device: torch.device, dtype: str, command: list[str], known: str | None = None
) -> dict[str, Any]:
    """Where, with what and how something runs; `known` is the commit where git does not know it."""
    environment = ("OMP_NUM_THREADS", "MALLOC_", "IMF_KERNELS_")
    return {
        **machine(device),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(environment)},
        "versions": versions(*PACKAGES),
        "commit": known or commit(),
        "backends": imf_kernels.backends(),
        "command": shlex.join(command),
    }


def machine(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"device": "CPU", "cpu": cpu_name()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **driver(f"GPU-{properties.uuid}"),
    }


def driver(uuid: str) -> dict[str, str]:
    """The driver, and the limits of power and clocks, as nvidia-smi says, where it is there."""
    asked = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem")
    command = [
        "nvidia-smi",
        f"--id={uuid}",
        f"--query-gpu={','.join(asked)}",
        "--format=csv,noheader",
    ]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(asked, run.stdout.strip().split(", "), strict=False))


def cpu_name() -> str:
    """The processor, and the widest vectors that PyTorch takes it for."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.processor()} ({capability})"


def versions(*packages: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "imf_kernels": imf_kernels.__version__,
    }
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The checked-out commit, "-dirty" if tracked files differ from it but for results, which a run
    itself writes; None outside a repository."""
    git = functools.partial(
        subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    try:
        head = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        changed = git(["git", "diff", "--name-only", "HEAD", "--", ":/", ":^results"]).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else head


def write(out: Path | None, results: Any) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary:
            temporary.write_text(json.dumps(results, indent=1))


class Report:
    """Rows and failures of a run: its file is whole after every row, so that no row is lost."""

    def __init__(self, name: str, args: argparse.Namespace, **more: Any) -> None:
        torch.backends.cudnn.allow_tf32 = False  # what is compared with is float32
        self.out: Path | None = args.out
        command = ["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]
        told = facts(torch.device(args.device), args.dtype, command, args.commit)
        self.results = {**told, **more, "rows": [], "failures": []}

    def add(self, row: dict[str, Any], line: str) -> None:
        self.results["rows"].append(row)
        print(line, flush=True)
        write(self.out, self.results)

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """A part of the run without which the run goes on: an exception is noted as a failure."""
        try:
            yield
        except Exception as error:
            trace = "".join(traceback.format_exception(error, limit=-8))
            self.fail(what, f"{type(error).__name__}: {error}", trace)

    def fail(self, what: str, reason: str, trace: str = "") -> None:
        self.results["failures"].append({"what": what, "error": reason, "traceback": trace})
        print(f"FAILED {what}: {reason.splitlines()[0]}", flush=True)
        write(self.out, self.results)

    def finish(self) -> int:
        """The exit status of the run."""
        write(self.out, self.results)
        count = len(self.results["failures"])
        if count:
            print(f"{count} failures")
        return min(count, 1)


def release() -> None:
    """Give back what the last contenders held: graphs, their memory, compiled code."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
