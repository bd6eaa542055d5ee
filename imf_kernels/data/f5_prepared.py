"""F5-TTS's prepared datasets, as its `prepare_*.py` write them."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from imf_kernels import checks
from imf_kernels.data import audio, mels
from imf_kernels.data.texts import Tokenizer
from imf_kernels.data.utterances import Utterance, fitted, within


class F5Prepared:
    """A folder with the rows `audio_path, text, duration` and their vocabulary.

    The rows are in `raw/` or `raw.arrow`, or with their mels (`mel_spec`) in `mel.arrow`; they are
    read from a memory map. Texts are tokens already.

    Args:
        audio_type: "raw" or "mel", F5-TTS's words.
        mel: A `Mel`, or the name of one: the one that the model was trained on, also of stored
            mels.
        tokenizer: "char": tokens are entries of `vocab`; "byte".
        vocab: None: the folder's `vocab.txt`.
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
        rate = self.mel.rate
        self.frames = [self.mel.frames(round(seconds[row] * rate)) for row in self._kept]
        paths = self._rows.column("audio_path")
        self.names = [paths[row] for row in self._kept]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Utterance:
        row, path = self._rows[self._kept[index]], self.folder / self.names[index]
        name = f"{path} (row {self._kept[index]} of {self._rows.name})"
        if "mel_spec" in row:
            mel = torch.tensor(row["mel_spec"], dtype=torch.float32)
            mel = mel.reshape(mel.shape[-2:]).mT.contiguous()  # (C, n), or (1, C, n)
        else:
            mel = self.mel(audio.read(name, path, self.mel.rate))
        checks.shape(f"mel_spec of {name}", mel, "n", self.mel.channels)
        mel = fitted(name, mel, self.frames[index])
        return Utterance(self.names[index], mel, {"text": self.tokenizer(row["text"])})

    def _durations(self) -> list[float]:
        """In seconds; what `duration.json` says counts more than the rows, as in F5-TTS."""
        path = self.folder / "duration.json"
        if not path.is_file():
            return self._rows.column("duration")
        try:
            seconds = [float(value) for value in json.loads(path.read_bytes())["duration"]]
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
        which = bisect_right(self._ends, index)
        batch = self._batches[which]
        return batch.slice(index - self._ends[which] + len(batch), 1).to_pylist()[0]

    def column(self, name: str) -> list[Any]:
        """All rows' values."""
        if any(name not in batch.schema.names for batch in self._batches):
            raise ValueError(f"{self.name}: expected a column {name!r}")
        return [value for batch in self._batches for value in batch.column(name).to_pylist()]


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
