"""UTMOS: naturalness, as listeners would rate it from 1 to 5."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from imf_kernels.metrics import audio
from imf_kernels.metrics.weights import existing

ENTRY = "utmos22_strong"


def utmos(
    weights: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> Callable[[Tensor], float]:
    """The UTMOS strong learner, as F5-TTS evaluates with it; called with a clip at 16 kHz.

    Args:
        weights: A copy of the repository tarepan/SpeechMOS (needs `torchaudio`), whose code is
            executed: with `utmos22_strong*.pt` in it, it fetches nothing. Or a TorchScript file of
            the network, called as `network(wave (1, samples), 16000)`.
        device: Where it runs.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: neither of the two.
    """
    path = Path(existing("utmos", weights))
    network = (_from_repository if path.is_dir() else _from_torchscript)(path).to(device).eval()

    @torch.inference_mode()
    def score(clip: Tensor) -> float:
        """Of a clip `(samples,)`, float32 at 16 kHz; higher is better."""
        audio.check("clip", clip)
        return network(clip[None].to(device), audio.RATE).item()

    return score


def _from_torchscript(path: Path) -> torch.nn.Module:
    try:
        return torch.jit.load(path, map_location="cpu")
    except RuntimeError as error:
        raise ValueError(
            f"metric 'utmos': expected a TorchScript file, got {path}: {error}"
        ) from error


def _from_repository(path: Path) -> torch.nn.Module:
    if not (path / "hubconf.py").is_file():
        raise ValueError(
            f"metric 'utmos': expected a copy of tarepan/SpeechMOS, got no hubconf.py in {path}"
        )
    saved = sorted(path.glob(f"{ENTRY}*.pt"))
    network = torch.hub.load(
        str(path), ENTRY, source="local", trust_repo=True, pretrained=not saved
    )
    if saved:
        network.load_state_dict(torch.load(saved[0], map_location="cpu", weights_only=True))
    return network
