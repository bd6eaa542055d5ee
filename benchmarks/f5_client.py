"""F5-TTS itself, for comparisons: `f5-tts` of PyPI, with the few of its needs that they have."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any


def load() -> Any:
    """`f5_tts.model`, with `CFM`, `DiT`, `Trainer`; without a fitting torchaudio, in spite of it.

    torchaudio serves the client's mel extraction only, which is no part of a solve or an update.

    Raises:
        ImportError: `f5-tts`, or something else that it needs, is not installed.
    """
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        for name in ("torchaudio", "torchaudio.transforms"):
            stand_in = types.ModuleType(name)
            stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None)
            sys.modules[name] = stand_in
    import f5_tts.model

    return f5_tts.model
