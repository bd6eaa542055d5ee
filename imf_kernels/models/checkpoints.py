"""Checkpoint files as dicts of tensors: `.pt` and `.safetensors`, from disk or the hub.

Nothing of a file is executed, and a file that is damaged, truncated or hostile is an error that
names it. Flipped bits are found in a `.pt`, by its checksums; a `.safetensors` has none, so there
they are found in the header only, or where they make a weight infinite or NaN.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imf_kernels.files import replacing

HUB = "hf://"
EMA, MODEL = "ema_model_state_dict", "model_state_dict"
"""Where F5-TTS's training files have their weights: averaged, and as they were trained."""


def read(path: str | os.PathLike[str], *, ema: bool = True) -> dict[str, Tensor]:
    """All tensors of a checkpoint, under the names that the file gives them.

    Of a training file these are the weights (`ema`: the averaged ones) without optimizer, scheduler
    and counters. The tensors are on the CPU, of the file's dtypes, and lie in the file, mapped into
    memory: copy what is kept, and do not write into the file meanwhile.

    The tensors of a `.pt` are held against its checksums. A `.safetensors` has none: flipped bits
    in its tensors are read as they are.

    Args:
        path: A `.pt` that `torch.save` wrote, or a `.safetensors`; on disk, or on the hub as
            "hf://owner/repo/folder/file" (needs `huggingface_hub`).

    Raises:
        ValueError: not such a file, or what it holds is more than dense tensors by name. It names
            the file.
        FileNotFoundError: no such file.
        ImportError: a file of the hub without `huggingface_hub`.
    """
    file = local(path)
    with naming(path):
        if format_of(file) == ".safetensors":
            held: Any = _read_safetensors(file)[0]
        else:
            held = _state_dict(_read_pt(file), ema)
        tensors = {name: _dense(name, value) for name, value in held.items()}
        size = sum(value.numel() * value.element_size() for value in tensors.values())
        if size > file.stat().st_size:  # views of one another: shapes that would fill the memory
            raise ValueError(f"expected tensors of at most the file's own size, got {size} bytes")
    return tensors


def metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a `.safetensors`. Errors are those of `read`."""
    file = local(path)
    with naming(path):
        return _read_safetensors(file)[1]


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    within: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint in the format of its suffix, atomically.

    Args:
        within: The entry of a `.pt` that holds the tensors; None: they are its entries.
        metadata: Of a `.safetensors`.

    Raises:
        ValueError: another suffix.
        FileNotFoundError: no such directory.
    """
    file = Path(path)
    if format_of(file) == ".safetensors":
        from safetensors.torch import save_file

        with replacing(file) as temporary:
            save_file(dict(tensors), temporary, {"format": "pt", **(metadata or {})})
        return
    with replacing(file) as temporary, temporary.open("wb") as stream:
        torch.save(dict(tensors) if within is None else {within: dict(tensors)}, stream)


def format_of(path: Path) -> str:
    """ ".pt" or ".safetensors".

    Raises:
        ValueError: another suffix.
    """
    if path.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"path: expected a file .pt or .safetensors, got {path.name!r}")
    return path.suffix


def local(path: str | os.PathLike[str]) -> Path:
    """The file on this machine, fetched from the hub if it is there.

    Raises:
        ValueError, FileNotFoundError, ImportError: see `read`.
    """
    name = os.fspath(path)
    file = _fetched(name) if name.startswith(HUB) else Path(name)
    if not file.exists():
        raise FileNotFoundError(f"path: expected a checkpoint, got no file: {path}")
    if not file.is_file():
        raise ValueError(f"path: expected a file, got a directory or device: {path}")
    return file


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Whatever is wrong with what a file holds becomes a ValueError that names the file."""
    try:
        yield
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _fetched(name: str) -> Path:
    owner, _, rest = name.removeprefix(HUB).partition("/")
    repo, _, inner = rest.partition("/")
    if not (owner and repo and inner):
        raise ValueError(f"path: expected '{HUB}owner/repo/folder/file', got {name!r}")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError(
            f"path: {name} is on the hub: pip install '.[hub]' (huggingface_hub)"
        ) from error
    try:
        return Path(hf_hub_download(f"{owner}/{repo}", inner))
    except OSError as error:  # none of that name, no access, no connection
        raise FileNotFoundError(f"path: cannot fetch {name}: {error}") from error
    except ValueError as error:
        raise ValueError(f"path: expected a name of the hub, got {name!r}: {error}") from error


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return tensors, opened.metadata() or {}
    except (SafetensorError, OSError, RuntimeError, AttributeError) as error:
        raise ValueError(f"expected a whole safetensors file: {error}") from error


def _read_pt(file: Path) -> Any:
    """Mapped, so that no tensor reaches beyond the file: a lying size is an error there."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            names = {entry.filename for entry in entries}
            if len(names) < len(entries) or any(entry.compress_type for entry in entries):
                raise ValueError("entries that are compressed or have the same name")
            damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged is not None:
            raise ValueError(f"{damaged} does not match its checksum")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # reading a damaged archive or pickle may raise anything
        reason = str(error).strip().rpartition("WeightsUnpickler error:")[2].strip()
        raise ValueError(
            "expected a whole archive that torch.save wrote, of nothing but tensors and plain "
            f"values: {type(error).__name__}: {reason.partition(chr(10))[0]}"
        ) from error


def _state_dict(held: Any, ema: bool) -> dict[Any, Any]:
    """The state dict of a training file, or `held` itself, without plain values (epoch, step)."""
    if not isinstance(held, dict):
        raise ValueError(f"expected a dict of tensors, got {type(held).__name__}")
    states = [name for name in (EMA, MODEL) if name in held]
    if states:
        wanted = EMA if ema else MODEL
        if not isinstance(held.get(wanted), dict):
            raise ValueError(f"{wanted}: expected a dict with ema={ema}, got {states}")
        held = {k: v for k, v in held[wanted].items() if not str(k).startswith("online_model.")}
    plain = (int, float, str, type(None))
    return {name: value for name, value in held.items() if not isinstance(value, plain)}


def _dense(name: Any, value: Any) -> Tensor:
    if not isinstance(name, str):
        raise ValueError(f"expected names of tensors, got {name!r}")
    if type(value) not in (Tensor, nn.Parameter):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise ValueError(f"{name}: expected a dense tensor, got {value.layout} on {value.device}")
    return value.detach()
