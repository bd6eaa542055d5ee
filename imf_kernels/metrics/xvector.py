"""Speaker similarity by a light x-vector."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from imf_kernels.metrics.audio import RATE
from imf_kernels.metrics.speakers import Similarity
from imf_kernels.metrics.weights import pretrained


def sim_xvector(
    weights: str | os.PathLike[str] = "hf://microsoft/wavlm-base-plus-sv",
    device: torch.device | str = "cpu",
) -> Similarity:
    """Speaker similarity by `transformers`' `WavLMForXVector`: 100 M parameters for SIM-o's 320 M.

    Its numbers are not those of SIM-o. Its model card calls cosines above .86 the same speaker.

    Args:
        weights: A folder of such a model and its feature extractor, or "hf://owner/repo".
        device: Where it runs.

    Raises:
        FileNotFoundError: no such folder.
    """
    folder = pretrained("sim_xvector", weights)
    from transformers import AutoFeatureExtractor, WavLMForXVector

    extract = AutoFeatureExtractor.from_pretrained(folder)
    model: Any = WavLMForXVector.from_pretrained(folder, dtype=torch.float32)
    model.to(device).eval()

    def embed(clip: Tensor) -> Tensor:
        features = extract(clip[0].cpu().numpy(), sampling_rate=RATE, return_tensors="pt")
        return model(features["input_values"].to(device)).embeddings

    return Similarity(embed, device, shortest=RATE // 3)  # its convolutions see 15 frames
