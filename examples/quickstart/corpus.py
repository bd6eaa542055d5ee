"""A small speech corpus made on the spot: espeak-ng speaks template sentences in 12 voices.

Some 30 minutes in 800 utterances, each with the phoneme under every mel frame, in seconds and
from a seed alone. Texts, voices, pitches, rates and splits depend only on the seed; the audio
itself is not bit-reproducible (see espeak.py), so never hash a corpus.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from examples.quickstart.audio import HOP, SAMPLE_RATE, log_mel
from examples.quickstart.espeak import Speech, speak
from examples.quickstart.sentences import draw_sentences

SILENCE = "_"  # symbol 0: pauses, and any phoneme that a given table lacks
SPEAKERS = ("en-us", *(f"en-us+m{i}" for i in range(1, 7)), *(f"en-us+f{i}" for i in range(1, 6)))
SENTENCES = {"train": 352, "dev": 8, "test": 24}
RENDERINGS = 2  # of every sentence, by different speakers
PITCH = (35, 65)  # espeak units, 50 is the voice's own
RATE = (145, 185)  # words per minute


@dataclass(frozen=True, slots=True)
class Utterance:
    """One sentence by one speaker.

    Attributes:
        text: What was said.
        speaker: Index into `Corpus.speakers`.
        phonemes: `(N,)` int64, index into `Corpus.symbols` of the phoneme at each frame's centre.
        mel: `(N, 80)` float32, normalised log-mel at 50 frames per second.
    """

    text: str
    speaker: int
    phonemes: Tensor
    mel: Tensor


@dataclass(frozen=True)
class Corpus:
    """Three splits that share no sentence, and what the ids in them mean."""

    train: list[Utterance]
    dev: list[Utterance]
    test: list[Utterance]
    symbols: tuple[str, ...]
    speakers: tuple[str, ...]


def build_corpus(seed: int = 0, symbols: Sequence[str] | None = None) -> Corpus:
    """Synthesise the corpus of `seed`.

    Args:
        seed: Another seed draws other sentences, voices, pitches and rates in every split.
        symbols: Phoneme table of a trained model, "_" first; a phoneme it lacks becomes id 0.
            By default the table is made from the training split.
    """
    if symbols is not None and (not symbols or symbols[0] != SILENCE):
        raise ValueError(f"symbols must start with {SILENCE!r}, got {list(symbols)[:1]}")
    rng = random.Random(seed)
    sentences = iter(draw_sentences(sum(SENTENCES.values()), rng))
    spoken = {}
    for split, count in SENTENCES.items():
        speakers = _deal_speakers(rng)
        spoken[split] = [
            _render(text, next(speakers), rng)
            for text in itertools.islice(sentences, count)
            for _ in range(RENDERINGS)
        ]
    if symbols is None:
        heard = {_symbol(name) for *_, speech in spoken["train"] for _, name in speech.phonemes}
        symbols = (SILENCE, *sorted(heard - {SILENCE}))
    ids = {symbol: index for index, symbol in enumerate(symbols)}
    splits = {
        split: [_utterance(*rendering, ids) for rendering in renderings]
        for split, renderings in spoken.items()
    }
    return Corpus(**splits, symbols=tuple(symbols), speakers=SPEAKERS)


def _deal_speakers(rng: random.Random) -> Iterator[int]:
    """Endless speaker ids from shuffled decks: every voice equally often."""
    while True:
        yield from rng.sample(range(len(SPEAKERS)), len(SPEAKERS))


def _render(text: str, speaker: int, rng: random.Random) -> tuple[str, int, Speech]:
    speech = speak(text, SPEAKERS[speaker], pitch=rng.randint(*PITCH), rate=rng.randint(*RATE))
    if speech.sample_rate != SAMPLE_RATE:
        raise RuntimeError(f"espeak-ng speaks at {speech.sample_rate} Hz, expected {SAMPLE_RATE}")
    return text, speaker, speech


def _symbol(name: str) -> str:
    """espeak's mnemonic without its stress mark; pauses of every length are one symbol.

    Stress explains under .002 of the mel's variance on top of the phoneme, for 23 more symbols.
    """
    return name.lstrip("',") if name.strip("_:") else SILENCE


def _utterance(text: str, speaker: int, speech: Speech, ids: dict[str, int]) -> Utterance:
    mel = log_mel(speech.audio)
    starts = np.array([start for start, _ in speech.phonemes])
    spans = np.array([0] + [ids.get(_symbol(name), 0) for _, name in speech.phonemes])
    centres = np.arange(len(mel)) * HOP
    phonemes = spans[np.searchsorted(starts, centres, side="right")]  # before the first: silence
    return Utterance(text, speaker, torch.from_numpy(phonemes).long(), mel)
