"""Word error rate, as Seed-TTS-eval and F5-TTS count it (`jiwer`, `zhon`)."""

from __future__ import annotations

import functools
import string
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from imf_kernels import checks
from imf_kernels.metrics import audio

LANGUAGES = ("en", "zh")


class Heard(NamedTuple):
    """What a recogniser heard, and its errors per word (in Chinese per character) of the text."""

    wer: float
    text: str


class WER:
    """`wer(clip, text)`: what a recogniser hears, held against the text.

    Punctuation goes (Latin and Chinese, apostrophes and hyphens too), English is lower case, and a
    Chinese character is a word; traditional ones that the recogniser writes become simplified. A
    test set's figure is the mean over its utterances. In Chinese F5-TTS and Seed-TTS-eval listen
    with Paraformer; any recogniser can be given.

    Args:
        transcribe: A clip `(samples,)`, float32 at 16 kHz, to its text (`whisper` makes one).
        language: "en" or "zh".
        keep: Punctuation that stays: none in F5-TTS, "'" in Seed-TTS-eval's own English script.
    """

    def __init__(
        self, transcribe: Callable[[Tensor], str], language: str = "en", keep: str = ""
    ) -> None:
        checks.choice("language", language, LANGUAGES)
        errors("1", "1", language, keep)  # a missing library is an error before any clip is heard
        self.transcribe, self.language, self.keep = transcribe, language, keep
        self._simplified: Callable[[str], str] = str
        if language == "zh":
            import zhconv

            self._simplified = functools.partial(zhconv.convert, locale="zh-cn")

    def __call__(self, clip: Tensor, text: str) -> Heard:
        """Raises ValueError for a text without a word."""
        audio.check("clip", clip)
        heard = self._simplified(self.transcribe(clip))
        return Heard(errors(text, heard, self.language, self.keep), heard)


def errors(text: str, heard: str, language: str = "en", keep: str = "") -> float:
    """Substitutions, deletions and insertions per word of the text; see `WER`.

    Raises:
        ValueError: a text without a word.
    """
    import jiwer

    truth = normalised(text, language, keep)
    if not truth:
        raise ValueError(f"text: expected at least one word, got {text!r}")
    return jiwer.process_words(truth, normalised(heard, language, keep)).wer


def normalised(text: str, language: str = "en", keep: str = "") -> str:
    """Words with one space between them, without punctuation; see `WER`."""
    checks.choice("language", language, LANGUAGES)
    bare = text.translate({ord(mark): None for mark in _punctuation() if mark not in keep})
    return " ".join(bare.lower().split() if language == "en" else "".join(bare.split()))


@functools.cache
def _punctuation() -> str:
    from zhon.hanzi import punctuation

    return punctuation + string.punctuation
