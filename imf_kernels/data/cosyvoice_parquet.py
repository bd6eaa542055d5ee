"""CosyVoice's training data: parquet files with audio, speech tokens and speaker embeddings."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from imf_kernels import checks
from imf_kernels.data import audio, mels
from imf_kernels.data.kept import kept
from imf_kernels.data.utterances import Utterance, fitted, located, within
from imf_kernels.files import replacing

TOKENS_PER_SECOND = 25
FRAMES_PER_TOKEN = 2
ROWS = 64
"""Of a row group, from which on reading one row at random is waste."""


class CosyVoiceParquet:
    """The rows of parquet files (`utt`, `audio_data`, `speech_token`, ...), read one at a time.

    Tokens and mel are trimmed to each other: two frames a token. The features are "tokens" `(m,)`
    and "speaker" `(S,)`. A row costs the reading of its row group, which CosyVoice's own files have
    but one of: `regroup` makes copies of them that are fit for random access. Names and lengths are
    kept until a file changes, in the folder's `.lengths.json`, or a list's beside it.

    Args:
        source: A list of files, one a line (`data.list`); a folder of them (`*.parquet`, or
            `parquet_*.tar`, CosyVoice's name for the same); or one of them.
        mel: A `Mel`, or the name of one: "cosyvoice2" or "cosyvoice3".
        embedding: "utt" or "spk": the utterance's own, or its speaker's mean.
        min_seconds, max_seconds: Rows of other lengths, by their tokens, are left out, which
            `left_out` counts.

    Raises:
        FileNotFoundError, ValueError: what is not there or cannot be read; naming file and row.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        mel: mels.Mel | str = "cosyvoice2",
        embedding: str = "utt",
        min_seconds: float = 1.0,
        max_seconds: float = 60.0,
    ) -> None:
        checks.choice("embedding", embedding, ("utt", "spk"))
        self.mel, self.embedding = mels.of(mel), f"{embedding}_embedding"
        self._groups: list[tuple[Path, int]] = []
        sizes: list[int] = []
        names: list[str] = []
        counts: list[int] = []
        paths = [path.absolute() for path in _files(Path(source))]
        told = kept(_place(Path(source)), [str(path) for path in paths], _tables)
        for path, table in zip(paths, told, strict=True):
            missing = {*self._columns, "utt"} - set(table["columns"])
            if missing:
                raise ValueError(f"{path}: expected columns {sorted(missing)}, got none")
            self._groups += [(path, group) for group in range(len(table["groups"]))]
            sizes += table["groups"]
            names += table["names"]
            counts += table["tokens"]
        if max(sizes, default=0) > ROWS:
            warnings.warn(
                f"source: row groups of up to {max(sizes)} rows in {source}, each of which is read "
                "for one row: make copies with imf_kernels.data.regroup",
                RuntimeWarning,
                stacklevel=2,
            )
        self._ends = list(accumulate(sizes))
        tokens = torch.tensor(counts)
        seconds = tokens.double() / TOKENS_PER_SECOND
        self._kept, self.left_out = within(seconds, min_seconds, max_seconds)
        self.frames = FRAMES_PER_TOKEN * tokens[self._kept]
        self.names = [names[row] for row in self._kept.tolist()]

    @property
    def _columns(self) -> list[str]:
        return ["audio_data", "speech_token", self.embedding]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Utterance:
        number = int(self._kept[index])
        which = bisect_right(self._ends, number)
        path, group = self._groups[which]
        with _opened(path) as file:
            rows = file.read_row_group(group, self._columns)
            row = rows.slice(number - self._ends[which] + len(rows), 1).to_pylist()[0]
        name = f"{path}, {self.names[index]}"
        wave = audio.read(name, row["audio_data"], self.mel.rate)
        mel = self.mel(wave / wave.abs().max().clamp(min=1))
        mel = fitted(name, mel, int(self.frames[index]))
        tokens = torch.tensor(row["speech_token"])[: len(mel) // FRAMES_PER_TOKEN]
        speaker = torch.tensor(row[self.embedding], dtype=torch.float32)
        return Utterance(
            self.names[index],
            mel[: FRAMES_PER_TOKEN * len(tokens)],
            {"tokens": tokens, "speaker": speaker},
        )


def regroup(source: str | Path, folder: str | Path, *, rows: int = 8) -> Path:
    """Copies of a `CosyVoiceParquet`'s files in a folder, with `rows` rows a row group.

    Returns:
        The list of the copies, `data.list` in the folder.
    """
    import pyarrow.parquet as pq

    checks.positive_int("rows", rows)
    folder, copies = Path(folder).absolute(), []
    folder.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(_files(Path(source))):
        copy = folder / f"{number:09d}.parquet"
        with (
            _opened(path) as file,
            replacing(copy) as temporary,
            pq.ParquetWriter(temporary, file.schema_arrow) as writer,
        ):
            for batch in file.iter_batches(rows):
                writer.write_batch(batch)
        copies.append(f"{copy}\n")
    with replacing(folder / "data.list") as temporary:
        temporary.write_text("".join(copies), encoding="utf-8")
    return folder / "data.list"


def _place(source: Path) -> Path:
    return source / ".lengths.json" if source.is_dir() else source.with_suffix(".lengths.json")


def _tables(paths: list[str]) -> list[dict[str, list[Any]]]:
    """Of each file its columns, the rows of its groups, and the names and tokens of its rows."""
    import pyarrow.compute as pc

    made = []
    for path in paths:
        with _opened(Path(path)) as file:
            columns, metadata = file.schema_arrow.names, file.metadata
            groups = [metadata.row_group(k).num_rows for k in range(file.num_row_groups)]
            table = file.read([name for name in ("utt", "speech_token") if name in columns])
        told = {"columns": columns, "groups": groups, "names": [], "tokens": []}
        if {"utt", "speech_token"} <= set(columns):
            counts = pc.fill_null(pc.list_value_length(table["speech_token"]), 0)
            told |= {"names": table["utt"].to_pylist(), "tokens": counts.to_pylist()}
        made.append(told)
    return made


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            yield file
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: expected a parquet file: {error}") from error


def _files(source: Path) -> list[Path]:
    if source.is_dir():
        paths = sorted([*source.glob("*.parquet"), *source.glob("parquet_*.tar")])
    elif not source.is_file():
        raise FileNotFoundError(f"source: expected a list, a folder or a file, got none: {source}")
    elif source.suffix in (".parquet", ".tar"):
        paths = [source]
    else:
        lines = source.read_text(encoding="utf-8").splitlines()
        paths = [located(line.strip(), source.parent) for line in lines if line.strip()]
    if not paths:
        raise ValueError(f"source: expected parquet files, got none in {source}")
    return paths
