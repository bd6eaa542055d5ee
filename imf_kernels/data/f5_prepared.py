"""F5-TTS's prepared datasets, as its `prepare_*.py` write them."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imf_kernels import checks
from imf_kernels.data import audio, mels, texts
from imf_kernels.data.texts import Tokenizer
from imf_kernels.data.utterances import Utterance, fitted, located, within


class F5Prepared:
    """A folder with the rows `audio_path, text, duration` and their vocabulary.

    The rows are in `raw/` or `raw.arrow`, or with their mels (`mel_spec`) in `mel.arrow`; they are
    read from a memory map, and so are the names. Texts are tokens already: those of a folder for
    "pinyin" syllables. A relative `audio_path` is one as F5-TTS opens it, or else is seen from the
    folder.

    Args:
        audio_type: "raw" or "mel", F5-TTS's words.
        mel: A `Mel`, or the name of one: the one that the model was trained on, also of stored
            mels.
        tokenizer: "char": tokens are entries of `vocab`, syllables too; "byte".
        vocab: See `Tokenizer`. None: the folder's `vocab.txt`.
        min_seconds, max_seconds: Rows of other lengths are left out, which `left_out` counts.

    Raises:
        FileNotFoundError, ValueError: what is not there or cannot be read; naming file and row.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        audio_type: str = "raw",
        mel: mels.Mel | str = "vocos",
        tokenizer: str = "char",
        vocab: str | Path | None = None,
        min_seconds: float = 0.3,
        max_seconds: float = 30.0,
    ) -> None:
        checks.choice("audio_type", audio_type, ("raw", "mel"))
        checks.choice("tokenizer", tokenizer, ("char", "byte"))
        self.folder, self.mel = Path(folder), mels.of(mel)
        if vocab is None and tokenizer == "char":
            vocab = self.folder / "vocab.txt"
        self.tokenizer = Tokenizer(tokenizer, vocab)
        self._rows = ArrowRows(_arrow_files(self.folder, audio_type))
        seconds = self._durations()
        self._kept, self.left_out = within(seconds, min_seconds, max_seconds)
        self.frames = self.mel.frames_of((seconds[self._kept] * self.mel.rate).round().long())
        self.names = _Names(self._rows, self._kept)
        self._rows.expect("text")
        first = self._kept[: texts.FIRST].tolist()
        self.tokenizer.check(self._rows.value(row, "text") for row in first)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Utterance:
        number, written = int(self._kept[index]), self.names[index]
        row, path = self._rows[number], located(written, self.folder)
        name = f"{path} (row {number} of {self._rows.name})"
        if "mel_spec" in row:
            mel = torch.tensor(row["mel_spec"], dtype=torch.float32)
            mel = mel.reshape(mel.shape[-2:]).mT.contiguous()  # (C, n), or (1, C, n)
        else:
            mel = self.mel(audio.read(name, path, self.mel.rate))
        checks.shape(f"mel_spec of {name}", mel, "n", self.mel.channels)
        mel = fitted(name, mel, int(self.frames[index]))
        return Utterance(written, mel, {"text": self.tokenizer(row["text"])})

    def _durations(self) -> Tensor:
        """In seconds, float64; `duration.json` counts more than the rows, as in F5-TTS."""
        path = self.folder / "duration.json"
        if not path.is_file():
            return self._rows.numbers("duration")
        try:
            held = json.loads(path.read_bytes())["duration"]
            seconds = torch.frombuffer(array("d", held), dtype=torch.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f'{path}: expected {{"duration": [seconds, ...]}}: {error}') from error
        if len(seconds) != len(self._rows):
            raise ValueError(
                f"{path}: expected one for each of {len(self._rows)} rows of {self._rows.name}, "
                f"got {len(seconds)}"
            )
        return seconds


class ArrowRows(Sequence[dict[str, Any]]):
    """Rows of files in Arrow's stream format, mapped into memory by each process that reads."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths, self.name = list(paths), str(paths[0])
        self._open()

    def _open(self) -> None:
        import pyarrow

        self._batches: list[Any] = []
        for path in self.paths:
            try:
                with pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))) as stream:
                    self._batches += list(stream)
            except (OSError, pyarrow.ArrowException) as error:
                raise ValueError(f"{path}: expected an Arrow stream: {error}") from error
        self._ends = list(accumulate(len(batch) for batch in self._batches))

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        batch, place = self._place(index)
        return batch.slice(place, 1).to_pylist()[0]

    def value(self, index: int, name: str) -> Any:
        """One row's value of a column."""
        batch, place = self._place(index)
        return batch.column(name)[place].as_py()

    def values(self, name: str) -> Iterator[Any]:
        """All rows' values, one record batch in memory at a time."""
        for batch in self._batches:
            yield from batch.column(name).to_numpy(zero_copy_only=False)

    def numbers(self, name: str) -> Tensor:
        """All rows' numbers, float64; NaN where there is none."""
        self.expect(name)
        parts = [batch.column(name).cast("double") for batch in self._batches]
        made = [torch.tensor(part.to_numpy(zero_copy_only=False)) for part in parts]
        return torch.cat([torch.zeros(0, dtype=torch.float64), *made])

    def expect(self, name: str) -> None:
        """Raises a ValueError unless there is a column of this name."""
        if any(name not in batch.schema.names for batch in self._batches):
            raise ValueError(f"{self.name}: expected a column {name!r}")

    def _place(self, index: int) -> tuple[Any, int]:
        which = bisect_right(self._ends, index)
        batch = self._batches[which]
        return batch, index - self._ends[which] + len(batch)


class _Names(Sequence[str]):
    """The paths of some rows, `kept`, which ascend. They stay in the map."""

    def __init__(self, rows: ArrowRows, kept: Tensor) -> None:
        rows.expect("audio_path")
        self.rows, self.kept = rows, kept

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: Any) -> Any:
        return self.rows.value(int(self.kept[index]), "audio_path")

    def __iter__(self) -> Iterator[str]:
        mask = torch.zeros(len(self.rows), dtype=torch.bool)
        mask[self.kept] = True
        return compress(self.rows.values("audio_path"), mask.numpy().tobytes())


def _arrow_files(folder: Path, audio_type: str) -> list[Path]:
    """The files that `datasets` wrote, in order."""
    saved = folder / audio_type / "state.json"
    if saved.is_file():
        files = json.loads(saved.read_bytes())["_data_files"]
        return [saved.with_name(file["filename"]) for file in files]
    single = folder / f"{audio_type}.arrow"
    if not single.is_file():
        raise FileNotFoundError(f"folder: expected {saved} or {single}, got none of them")
    return [single]
