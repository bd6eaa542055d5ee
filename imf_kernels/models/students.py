"""A student as two files: one that the client's own code loads, and beside it what only we know.

The clients load strictly, so the first has the teacher's keys and no other. The second, a small
safetensors, holds the mixer (and the guidance's embedding, where there is one) and says what the
student is, both under a hash of the whole student. So damage to either file is noticed, and so is
half of another pair. While a student is written over another, the second file tells of both, so
that a crash at any point leaves one that loads.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imf_kernels import checks, grids
from imf_kernels.models import checkpoints, state_dicts
from imf_kernels.models.config import CausalUNetConfig, DiTConfig
from imf_kernels.models.cosyvoice2 import CausalUNet
from imf_kernels.models.dit import DiT
from imf_kernels.models.state_dicts import MIXER
from imf_kernels.version import __version__

SUFFIX = ".student.safetensors"
FORMAT = "1"
KINDS: dict[str, tuple[Any, Any]] = {
    "dit": (DiT, DiTConfig.from_dict),
    "causal_unet": (CausalUNet, lambda saved: CausalUNetConfig(**saved)),
}


class Student(NamedTuple):
    """A saved student.

    `model` is in eval mode; `grid`, float32 `(nfe + 1,)` on the CPU, is the one that it is to be
    sampled on, `guidance` the w that was distilled into it; None where none was given.
    """

    model: DiT | CausalUNet
    grid: Tensor | None
    guidance: float | None


def save_student(
    student: DiT | CausalUNet,
    path: str | os.PathLike[str],
    *,
    like: str | os.PathLike[str] | None = None,
    grid: str | Tensor | Sequence[float] | None = None,
    nfe: int | None = None,
    guidance: float | None = None,
) -> None:
    """Write `path`, in the teacher's shape, and `<path without suffix>.student.safetensors`.

    Weights keep their dtype. Both files are written atomically, and a student that was there before
    loads until the new one does.

    Args:
        path: A `.pt` or `.safetensors` file.
        like: The teacher's checkpoint: `path` gets all of its weights, the estimator's replaced by
            the student's, which is what CosyVoice loads. None: the estimator alone, under its
            client's prefix, which is what F5-TTS loads. (Give its `Trainer` a folder without
            the second file: of several `pretrained_*` it takes any.)
        grid, nfe: The grid to sample on: times, or a name with `nfe`.
        guidance: w of the teacher that was distilled.

    Raises:
        ValueError, TypeError, FileNotFoundError: a model that is baked, in FP8, without mixer or of
            several dtypes; a `like` of another shape; a file or directory that is not there. They
            name the argument or the file.
    """
    own = _savable(student)
    checkpoints.format_of(Path(path))
    guidance = _finite("guidance", guidance)
    if grid is None and nfe is not None:
        raise ValueError(f"nfe: expected None without a grid, got {nfe}")
    times = None if grid is None else grids.make(grid, nfe).tolist()

    f5 = isinstance(student, DiT) and student.config.text is not None
    if like is not None:
        weights = _in_place(own, student.root, like)
    else:
        ahead = "ema_model.transformer." if f5 else "decoder.estimator."
        weights = {ahead + name: v for name, v in own.items() if not state_dicts.ours(name)}
        if f5:
            weights |= {"initted": torch.tensor(True), "step": torch.tensor(0)}
    said = json.dumps(
        {
            "kind": "dit" if isinstance(student, DiT) else "causal_unet",
            "config": asdict(student.config),
            "grid": times,
            "guidance": guidance,
            "imf_kernels": __version__,
            "torch": torch.__version__,
        }
    )
    side, new = side_file(path), {state_dicts.fingerprint(said, own): (said, _ours(own))}
    try:
        before = _read_side(side)
    except (ValueError, FileNotFoundError):
        before = {}
    _write_side(side, before | new)
    checkpoints.write(path, weights, within=checkpoints.EMA if f5 else None)
    if before:
        _write_side(side, new)


def load_student(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Student:
    """Read what `save_student` wrote; `path` is the teacher-shaped file, on disk or on the hub.

    Raises:
        ValueError, FileNotFoundError: naming the file; also a pair that is damaged or does not
            belong together. A device that is not there is a ValueError, too.
    """
    device = checks.device("device", device)
    weights, side = checkpoints.read(path), side_file(path)
    try:
        students = _read_side(side)
    except FileNotFoundError as error:
        name = os.path.basename(side)
        raise FileNotFoundError(
            f"{path}: not a student: its {name} is missing; the two belong together"
        ) from error
    for digest, (text, extra) in students.items():
        with checkpoints.naming(side):
            said = json.loads(text)
            if said["kind"] not in KINDS:
                raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {said['kind']!r}")
            model_type, config_of = KINDS[said["kind"]]
        with contextlib.suppress(ValueError):  # weights of another kind
            own = state_dicts.without_prefix(weights, model_type.root) | extra
            if state_dicts.fingerprint(text, own) == digest:
                break
    else:
        raise ValueError(
            f"{path}: expected the weights that {side} was saved with, "
            "got others, or one of the two files is damaged"
        )
    with checkpoints.naming(side):
        config, guidance = config_of(said["config"]), _finite("guidance", said["guidance"])
        grid = None if said["grid"] is None else grids.validate(said["grid"])
    with checkpoints.naming(path):
        dtype = own[model_type.root].dtype
        model = state_dicts.load(lambda: model_type(config), config.blocks, own, dtype)
    return Student(model.to(device).eval(), grid, guidance)


def _finite(name: str, value: Any) -> float | None:
    if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
        raise ValueError(f"{name}: expected a finite number or None, got {value!r}")
    return value


def side_file(path: str | os.PathLike[str]) -> str:
    """Where what only we know of the student at `path` is."""
    return os.path.splitext(os.fspath(path))[0] + SUFFIX


Said = dict[str, tuple[str, dict[str, Tensor]]]
"""By fingerprint, what is said of a student, and its weights that the clients do not know."""


def _read_side(side: str) -> Said:
    """Of several students amid a write."""
    said, weights = checkpoints.metadata(side), checkpoints.read(side)
    with checkpoints.naming(side):
        found = said.pop("format", None)
        if found != FORMAT:
            raise ValueError(f"format: expected {FORMAT!r}, got {found!r}")
        extras: dict[str, dict[str, Tensor]] = {}
        for key, value in weights.items():
            digest, _, name = key.partition(".")
            extras.setdefault(digest, {})[name or MIXER] = value
        mixed = all(MIXER in extra for extra in extras.values())
        if not extras or said.keys() != extras.keys() or not mixed:
            raise ValueError(
                "expected a mixer for every student that it tells of, "
                f"got {state_dicts.few(extras)} for {state_dicts.few(said)}"
            )
    return {digest: (said[digest], extra) for digest, extra in extras.items()}


def _write_side(side: str, held: Said) -> None:
    said = {digest: text for digest, (text, _) in held.items()}
    weights = {
        digest if name == MIXER else f"{digest}.{name}": value
        for digest, (_, extra) in held.items()
        for name, value in extra.items()
    }
    checkpoints.write(side, weights, metadata={"format": FORMAT, **said})


def _ours(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in own.items() if state_dicts.ours(name)}


def _savable(student: Any) -> dict[str, Tensor]:
    """A student's weights on the CPU, if it is one that can be saved."""
    if type(student) not in (DiT, CausalUNet):
        raise TypeError(f"student: expected a DiT or a CausalUNet, got {type(student).__name__}")
    config = student.config
    for name in ("baked", "fp8"):
        if getattr(config, name, False):
            raise ValueError(f"student: expected a trainable model, got one with {name}")
    if not config.mixer:
        raise ValueError("student: expected a model with a mixer (`model.student()`), got none")
    dtypes = {weight.dtype for weight in student.parameters()}
    if len(dtypes) > 1:
        raise ValueError(f"student: expected weights of one dtype, got {dtypes}")
    own = {name: value.detach().cpu() for name, value in student.state_dict().items()}
    with torch.device("meta"):
        expected = type(student)(config).state_dict()
    state_dicts.check(expected, own)  # no adapters in the place of layers
    return own


def _in_place(
    own: Mapping[str, Tensor], root: str, like: str | os.PathLike[str]
) -> dict[str, Tensor]:
    """The weights of `like`, as copies, with an estimator's own in their place."""
    weights = checkpoints.read(like)
    with checkpoints.naming(like):
        ahead = state_dicts.prefix(weights, root)
        theirs = state_dicts.without_prefix(weights, root)
        expected = {k: v for k, v in own.items() if k in theirs or not state_dicts.ours(k)}
        state_dicts.check(expected, theirs)
    replaced = {ahead + name: own[name] for name in theirs}
    kept = {name: value.clone() for name, value in weights.items() if name not in replaced}
    return {name: replaced[name] if name in replaced else kept[name] for name in weights}
