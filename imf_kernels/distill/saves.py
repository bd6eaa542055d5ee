"""Checkpoints: complete or invisible, verified before they are used, without pickle.

    step_00001000/
        model.safetensors  ema.safetensors  optimizer.safetensors  objective_<rank>.safetensors
        state.json         manifest.json (the others' sizes and SHA-256)

One is written into a hidden directory and takes its name when all of it is on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imf_kernels.files import replacing

MANIFEST = "manifest.json"


class Draft:
    """A checkpoint that is being written, by all ranks into one directory."""

    def __init__(self, folder: Path, update: int) -> None:
        self.path = folder / f"step_{update:08d}"
        self.hidden = folder / f".{self.path.name}.tmp"
        self.files: dict[str, dict[str, Any]] = {}

    def begin(self) -> None:
        """One rank's, before all others'."""
        with self._telling(self.hidden):
            self.hidden.mkdir()

    def add(self, name: str, data: bytes) -> None:
        """A file that is on the disk when this returns; `files` says what it holds.

        Raises:
            OSError: it cannot be written.
        """
        path = self.hidden / name
        with self._telling(path):
            self.files[name] = write(path, lambda file: file.write_bytes(data))

    def add_tensors(
        self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
    ) -> None:
        """`<name>.safetensors`, likewise; the tensors are not copied."""
        path = self.hidden / f"{name}.safetensors"
        with self._telling(path):
            self.files[path.name] = write(path, lambda file: _save(tensors, file, metadata))

    def add_flat(self, name: str, values: Mapping[str, Any]) -> None:
        """Tensors as `<name>.safetensors`, numbers as its metadata."""
        tensors = {k: v.detach().cpu() for k, v in values.items() if isinstance(v, Tensor)}
        tensors = {k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
        numbers = {k: v for k, v in values.items() if k not in tensors}
        self.add_tensors(name, tensors, {"numbers": json.dumps(numbers)})

    def publish(self, keep: int) -> Path:
        """One rank's, after all others': give it its name; the oldest beyond `keep` go."""
        self.add(MANIFEST, json.dumps(self.files, indent=1).encode())
        with self._telling(self.path):
            _sync(self.hidden)
            _remove(self.path)  # a damaged one of the same update
            self.hidden.rename(self.path)
            _sync(self.path.parent)
        older = self._older()
        for old in older[: max(len(older) + 1 - keep, 0)] if keep else ():
            _remove(old)
        return self.path

    def abandon(self) -> None:
        shutil.rmtree(self.hidden, ignore_errors=True)

    def _older(self) -> list[Path]:
        """Those before this one. Any after it is damaged, or the run would have begun there."""
        return [p for p in names(self.path.parent) if update_of(p) < update_of(self.path)]

    @contextlib.contextmanager
    def _telling(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = self._older()
            last = f"the last good one is {kept[-1].name}" if kept else "there is none yet"
            raise OSError(
                error.errno,
                f"{error.strerror or error}, writing the checkpoint {self.path.name} ({last})",
                str(path),
            ) from error


def write(path: Path, fill: Callable[[Path], object]) -> dict[str, Any]:
    """A file that `fill` writes, on the disk when this returns; what the manifest says of it."""
    with replacing(path) as temporary:
        fill(temporary)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def begin(folder: Path) -> None:
    """Make the folder of a run's checkpoints, and remove what killed runs have left there.

    Raises:
        OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".step_*.tmp"):
        shutil.rmtree(left)


def names(folder: Path) -> list[Path]:
    """The checkpoints, oldest first."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=update_of)


def update_of(path: Path) -> int:
    """The update that a checkpoint was written after."""
    return int(path.name.removeprefix("step_"))


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole, or None; each that is not is warned of.

    Raises:
        ValueError: there are some, all of them damaged.
    """
    paths = names(folder)
    for path in reversed(paths):
        wrong = damage(path)
        if wrong is None:
            return path
        warnings.warn(f"{path}: damaged ({wrong}), taking an older one", stacklevel=2)
    if paths:
        raise ValueError(
            f"folder: expected a checkpoint that is whole, got {len(paths)} damaged ones in "
            f"{folder}; to begin anew, move them away"
        )
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        for name, told in manifest.items():
            size = (path / name).stat().st_size
            if size != told["bytes"]:
                return f"{name}: expected {told['bytes']} bytes, got {size}"
            with (path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != told["sha256"]:
                    return f"{name}: its SHA-256 is another"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name}: missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: {error}"
    return None


def tensors(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of `<name>.safetensors`, mapped from the file: to be copied."""
    from safetensors.torch import load_file

    return load_file(path / f"{name}.safetensors")


def flat(path: Path, name: str) -> dict[str, Any]:
    """What `add_flat` was given."""
    from safetensors import safe_open

    with safe_open(path / f"{name}.safetensors", "pt") as file:
        numbers = json.loads(file.metadata()["numbers"])
    return {k: v.clone() for k, v in tensors(path, name).items()} | numbers


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    """safetensors' own, with the errors of the system as such."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _remove(path: Path) -> None:
    """Out of sight first: half of a checkpoint is never seen."""
    if path.exists():
        hidden = path.with_name(f".{path.name}.old.tmp")
        path.rename(hidden)
        shutil.rmtree(hidden)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
