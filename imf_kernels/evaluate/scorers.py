"""What each metric asks for, and how it scores one utterance."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from imf_kernels import metrics
from imf_kernels.evaluate.lists import Entry
from imf_kernels.models.checkpoints import HUB


@dataclass(frozen=True)
class Sample:
    """An utterance of a list and its generated file; audio is mono, float32 at 16 kHz."""

    entry: Entry
    file: Path

    @property
    def generated(self) -> Tensor:
        return metrics.read_audio(self.file)

    @property
    def prompt(self) -> Tensor:
        assert self.entry.prompt is not None
        return metrics.read_audio(self.entry.prompt)

    @property
    def truth(self) -> Tensor:
        assert self.entry.truth is not None
        return metrics.read_audio(self.entry.truth)


Score = Callable[[Sample], dict[str, Any]]
"""The value, and what is worth keeping beside it."""


@dataclass(frozen=True)
class Scorer:
    """A metric.

    Attributes:
        load: Makes its score from weights ("" if it has none), a language and a device.
        needs: Fields of `Entry` that it reads.
        weights: Names in the folder of weights, of which the first that is there is taken.
        hub: Where they are otherwise, if no folder is given.
        higher_is_better: Its direction.
    """

    load: Callable[[str, str, str], Score]
    needs: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    hub: str | None = None
    higher_is_better: bool = True

    def locate(self, name: str, folder: str | os.PathLike[str] | None) -> str:
        """The weights' path or "hf://" name; "" for a metric without weights.

        Raises:
            FileNotFoundError: there are none; the error names the metric `name`.
        """
        if not self.weights:
            return ""
        if folder is None and self.hub is not None:
            return self.hub
        if folder is None:
            raise FileNotFoundError(
                f"metric {name!r}: expected weights, a folder with {' or '.join(self.weights)}, "
                "got none, and the hub has none"
            )
        paths = [Path(folder) / weights for weights in self.weights]
        found = next((path for path in paths if path.exists()), None)
        if found is None:
            raise FileNotFoundError(
                f"metric {name!r}: expected weights at {' or '.join(map(str, paths))}, got none"
            )
        return str(found)


def _wer(weights: str, language: str, device: str) -> Score:
    wer = metrics.WER(metrics.whisper(weights, language, device), language)

    def score(sample: Sample) -> dict[str, Any]:
        heard = wer(sample.generated, sample.entry.text or "")
        return {"value": heard.wer, "heard": heard.text}

    return score


def _speakers(
    make: Callable[[str, str], metrics.Similarity], weights: str, language: str, device: str
) -> Score:
    similarity = make(weights, device)
    return lambda sample: {"value": similarity(sample.generated, sample.prompt)}


def _utmos(weights: str, language: str, device: str) -> Score:
    naturalness = metrics.utmos(weights, device)
    return lambda sample: {"value": naturalness(sample.generated)}


def _mcd(weights: str, language: str, device: str) -> Score:
    def score(sample: Sample) -> dict[str, Any]:
        both = ([metrics.log_mel(clip, metrics.RATE)] for clip in (sample.generated, sample.truth))
        return {"value": metrics.mcd_dtw(*both)}

    return score


SCORERS = {
    "wer": Scorer(
        _wer,
        needs=("text",),
        weights=("faster-whisper-large-v3", "whisper-large-v3"),
        hub=f"{HUB}openai/whisper-large-v3",
        higher_is_better=False,
    ),
    "sim_o": Scorer(
        functools.partial(_speakers, metrics.sim_o),
        needs=("prompt",),
        weights=("wavlm_large_finetune.pth",),
    ),
    "sim_xvector": Scorer(
        functools.partial(_speakers, metrics.sim_xvector),
        needs=("prompt",),
        weights=("wavlm-base-plus-sv",),
        hub=f"{HUB}microsoft/wavlm-base-plus-sv",
    ),
    "utmos": Scorer(_utmos, weights=("utmos22_strong.pt", "SpeechMOS")),
    "mcd": Scorer(_mcd, needs=("truth",), higher_is_better=False),
}
