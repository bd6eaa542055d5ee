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

    Raises:
        ValueError, FileNotFoundError: of `load_f5`; a vocabulary of another size than the model's.
    """
    from imf_kernels.models import load_f5

    return _host(load_f5(path, variant=variant), options)


def from_student(path: str | Path, **options: Any) -> F5TTS:
    """A host, in eval mode, on a saved student, sampled on the grid that it was saved with.

    Args:
        path: See `imf_kernels.models.load_student`.
        options: Of `F5TTS`; `grid` or `nfe` replace the student's grid.

    Raises:
        ValueError, FileNotFoundError: of `load_student`; a vocabulary of another size than the
            model's.
    """
    from imf_kernels.models import load_student

    student: Any = load_student(path)
    stored = {"guidance": student.guidance}
    if not {"grid", "nfe"} & options.keys():
        stored["grid"] = student.grid
    return _host(student.model, stored | options)


def _host(model: Any, options: dict[str, Any]) -> F5TTS:
    host, vocab = F5TTS(model, **options), options.get("vocab_char_map")
    if vocab is not None and len(vocab) != model.config.text.vocab:
        raise ValueError(
            f"vocab_char_map: expected the model's {model.config.text.vocab} tokens, "
            f"got {len(vocab)}"
        )
    return host.eval()
