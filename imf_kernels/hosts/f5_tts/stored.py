"""Hosts from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imf_kernels.hosts.f5_tts.host import F5TTS


def from_checkpoint(path: str | Path, variant: str, **options: Any) -> F5TTS:
    """A host, in eval mode, on the weights of one of F5-TTS's checkpoints.

    Args:
        path: See `imf_kernels.models.load_f5`.
        variant: "f5_v0" (`F5TTS_Base`) or "f5_v1": a checkpoint does not tell.
        options: Of `F5TTS`: `mel_spec`, `vocab_char_map`, ...
    """
    from imf_kernels.models import load_f5

    return F5TTS(load_f5(path, variant=variant), **options).eval()


def from_student(path: str | Path, **options: Any) -> F5TTS:
    """A host, in eval mode, on a saved student, sampled on the grid that it was saved with.

    Args:
        path: See `imf_kernels.models.load_student`.
        options: Of `F5TTS`; `grid` or `nfe` replace the student's grid.
    """
    from imf_kernels.models import load_student

    student: Any = load_student(path)
    stored = {"guidance": student.guidance}
    if not {"grid", "nfe"} & options.keys():
        stored["grid"] = student.grid
    return F5TTS(student.model, **(stored | options)).eval()
