"""A folder of audio files, with their transcripts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from imf_kernels.data import audio, mels
from imf_kernels.data.kept import THREADS, kept
from imf_kernels.data.texts import Tokenizer
from imf_kernels.data.utterances import Utterance, fitted, within

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus")
METADATA = "metadata.csv"
LENGTHS = ".lengths.json"


class AudioFolder:
    """The audio files below a folder, by their relative paths.

    With a `metadata.csv` in the folder they are those of its rows, as LJSpeech has them:
    `name|text`, or `name|text|normalised text`, of which the last counts; a name is a path, seen
    from the folder or its `wavs/`, with or without its suffix. Otherwise they are all that there
    are, and the transcript of `a/b.wav` is `a/b.txt`. Lengths are read from headers, and kept in
    the folder's `.lengths.json` until a file changes.

    Args:
        mel: A `Mel`, or the name of one.
        tokenizer: "byte", "char" or "pinyin", with the `vocab` of the last two (`Tokenizer`): the
            feature "text". None: no transcripts are needed.
        min_seconds, max_seconds: Files of other lengths are left out, which `left_out` counts.

    Raises:
        FileNotFoundError, ValueError: no folder, no audio, what cannot be read; naming file and
            row.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        mel: mels.Mel | str = "vocos",
        tokenizer: str | None = None,
        vocab: str | Path | None = None,
        min_seconds: float = 0.3,
        max_seconds: float = 30.0,
    ) -> None:
        self.folder, self.mel = Path(folder), mels.of(mel)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"folder: expected a folder of audio, got none at {folder}")
        if tokenizer is None and vocab is not None:
            raise ValueError("tokenizer: expected 'char' or 'pinyin' with a vocab, got None")
        self.tokenizer = None if tokenizer is None else Tokenizer(tokenizer, vocab)
        listed = (self.folder / METADATA).is_file()
        said = list(self._listed() if listed else self._found())
        if not said:
            raise ValueError(f"folder: expected audio ({', '.join(SUFFIXES)}) in {folder}")
        rate = self.mel.rate
        headers = kept(self.folder / LENGTHS, [name for name, _ in said], self._headers)
        samples, given = torch.tensor(headers).unbind(1)
        counts = audio.resampled(samples, given, rate)
        fit, self.left_out = within(counts.double() / rate, min_seconds, max_seconds)
        self.frames = self.mel.frames_of(counts[fit])
        self.names = [said[i][0] for i in fit.tolist()]
        self._texts = [said[i][1] for i in fit.tolist()]
        if self.tokenizer is not None:
            self.tokenizer.check(self._texts)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Utterance:
        name = self.names[index]
        path = self.folder / name
        mel = self.mel(audio.read(str(path), path, self.mel.rate))
        features = {}
        if self.tokenizer is not None:
            features["text"] = self.tokenizer(self._texts[index])
        return Utterance(name, fitted(str(path), mel, int(self.frames[index])), features)

    def _headers(self, names: list[str]) -> list[tuple[int, int]]:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(audio.header, (self.folder / name for name in names)))

    def _listed(self) -> Iterator[tuple[str, str]]:
        table = self.folder / METADATA
        for number, line in enumerate(table.read_text(encoding="utf-8-sig").split("\n"), 1):
            if not line.strip():
                continue
            name, *texts = line.rstrip("\r").split("|")
            if not texts:
                raise ValueError(f"{table}, row {number}: expected name|text, got {line!r}")
            places = [self.folder / name, self.folder / "wavs" / name]
            ends = ("", *SUFFIXES)
            paths = [place.with_name(place.name + end) for end in ends for place in places]
            path = next((path for path in paths if path.is_file()), None)
            if path is None:
                raise FileNotFoundError(
                    f"{table}, row {number}: expected an audio file for {name!r}, got none at "
                    f"{places[0]} or {places[1]}"
                )
            inside = path.is_relative_to(self.folder)
            name = path.relative_to(self.folder).as_posix() if inside else str(path)
            yield name, texts[-1].strip()

    def _found(self) -> Iterator[tuple[str, str]]:
        found = []
        for folder, _, files in os.walk(self.folder):
            inside = Path(folder).relative_to(self.folder).parts
            audible = (name for name in files if os.path.splitext(name)[1].lower() in SUFFIXES)
            found += [(*inside, name) for name in audible]
        for parts in sorted(found):
            name = "/".join(parts)
            yield name, "" if self.tokenizer is None else self._beside(name)

    def _beside(self, name: str) -> str:
        transcript = os.path.join(self.folder, os.path.splitext(name)[0] + ".txt")
        try:
            with open(transcript, encoding="utf-8") as file:
                return file.read().strip()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{self.folder / name}: expected {os.path.basename(transcript)} beside it, or a "
                f"{METADATA}"
            ) from error
