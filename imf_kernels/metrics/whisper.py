"""Speech to text by Whisper."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imf_kernels import checks
from imf_kernels.metrics.audio import RATE
from imf_kernels.metrics.weights import pretrained
from imf_kernels.metrics.wer import LANGUAGES

WINDOW = 30 * RATE
"""Samples that Whisper hears at once; more is heard window by window."""


def whisper(
    weights: str | os.PathLike[str] = "hf://openai/whisper-large-v3",
    language: str = "en",
    device: torch.device | str = "cpu",
) -> Callable[[Tensor], str]:
    """A recogniser: a clip `(samples,)`, float32 at 16 kHz, to its text.

    The weights' format decides who runs them. CTranslate2's (a folder with `model.bin`) run in
    `faster-whisper` with 5 beams, as F5-TTS evaluates; `transformers`' run there, greedily, as
    Seed-TTS-eval does. Both in float16 on a GPU.

    Args:
        weights: A folder of either format, or "hf://owner/repo" of `transformers`'.
        language: "en" or "zh".
        device: Where it runs.

    Raises:
        FileNotFoundError: no such folder.
    """
    checks.choice("language", language, LANGUAGES)
    folder = pretrained("wer", weights)
    make = _faster_whisper if (Path(folder) / "model.bin").is_file() else _transformers
    return make(folder, language, torch.device(device))


def _transformers(folder: str, language: str, device: torch.device) -> Callable[[Tensor], str]:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    dtype = torch.float16 if device.type == "cuda" else torch.float32
    processor = WhisperProcessor.from_pretrained(folder)
    model: Any = WhisperForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    model.to(device).eval()

    @torch.inference_mode()
    def transcribe(clip: Tensor) -> str:
        long = len(clip) > WINDOW
        heard = processor.feature_extractor(
            clip.numpy(),
            sampling_rate=RATE,
            return_tensors="pt",
            return_attention_mask=True,
            **({"truncation": False, "padding": "longest"} if long else {}),
        )
        ids = model.generate(
            heard["input_features"].to(device, dtype),
            attention_mask=heard["attention_mask"].to(device),
            language=language,
            task="transcribe",
            return_timestamps=long,
        )
        return processor.batch_decode(ids, skip_special_tokens=True)[0].strip()

    return transcribe


def _faster_whisper(folder: str, language: str, device: torch.device) -> Callable[[Tensor], str]:
    from faster_whisper import WhisperModel

    model = WhisperModel(
        folder,
        device=device.type,
        device_index=device.index or 0,
        compute_type="float16" if device.type == "cuda" else "float32",
    )

    def transcribe(clip: Tensor) -> str:
        segments, _ = model.transcribe(clip.numpy(), beam_size=5, language=language)
        return " ".join(segment.text.strip() for segment in segments)

    return transcribe
