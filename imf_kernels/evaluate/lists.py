"""Lists of test utterances: Seed-TTS-eval's, F5-TTS's of LibriSpeech-PC, CSV and JSONL."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One utterance of a list.

    Attributes:
        name: The generated file's, without folder and suffix.
        text: What it should say.
        prompt: The recording whose voice it should have.
        truth: A recording of the text by that voice.
    """

    name: str
    text: str | None = None
    prompt: Path | None = None
    truth: Path | None = None


def read_list(path: Path | str, audio: Path | str | None = None) -> list[Entry]:
    """The entries of a list, in its order.

    - `.jsonl`, `.csv` (with a header): the fields `name` and, as far as they are known, `text`,
      `prompt` and `truth`.
    - `utt|prompt text|prompt wav|text[|true wav]`: Seed-TTS-eval's `meta.lst`. Without a fifth
      field the true recording is `wavs/utt.wav`, if there is such a file.
    - Six fields between tabs (prompt's name, seconds and text, then the utterance's): F5-TTS's list
      of LibriSpeech-PC, whose recordings are `speaker/chapter/name.flac`.

    Args:
        path: The list.
        audio: The folder that recordings are relative to; by default the list's.

    Raises:
        FileNotFoundError: no such list.
        ValueError: not such a list, naming its line; no entries; two of one name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"list: expected a file, got no file: {path}")
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    folder = path.parent if audio is None else Path(audio)
    parse = _format(path, lines)
    try:
        entries = list(parse(lines, folder))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"list: {path}: {error}") from error
    if not entries:
        raise ValueError(f"list: expected at least one utterance, got none in {path}")
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"list: expected names once each, got {twice!r} twice in {path}")
    return entries


Parser = Callable[[list[str], Path], Iterator[Entry]]


def _format(path: Path, lines: list[str]) -> Parser:
    if path.suffix in (".csv", ".jsonl"):
        return _csv if path.suffix == ".csv" else _jsonl
    return _librispeech if any("\t" in line for line in lines) else _seed_tts


def _csv(lines: list[str], folder: Path) -> Iterator[Entry]:
    for number, fields in enumerate(csv.DictReader(lines), 2):
        yield _plain(number, fields, folder)


def _jsonl(lines: list[str], folder: Path) -> Iterator[Entry]:
    for number, line in _numbered(lines):
        yield _plain(number, json.loads(line), folder)


def _plain(number: int, fields: Mapping[str, Any], folder: Path) -> Entry:
    if not isinstance(fields, dict) or not fields.get("name"):
        raise ValueError(f"line {number}: expected a field 'name', got {fields}")
    prompt, truth = (
        folder / fields[key] if fields.get(key) else None for key in ("prompt", "truth")
    )
    return Entry(str(fields["name"]), fields.get("text") or None, prompt, truth)


def _seed_tts(lines: list[str], folder: Path) -> Iterator[Entry]:
    for number, line in _numbered(lines):
        name, _, prompt, text, *rest = _fields(number, line, "|", 4, 5)
        beside = folder / "wavs" / f"{name}.wav"
        truth = folder / rest[0] if rest else beside if beside.is_file() else None
        yield Entry(name, text, folder / prompt, truth)


def _librispeech(lines: list[str], folder: Path) -> Iterator[Entry]:
    def recording(name: str) -> Path:
        speaker, chapter, _ = name.split("-")
        return folder / speaker / chapter / f"{name}.flac"

    for number, line in _numbered(lines):
        prompt, _, _, name, _, text = _fields(number, line, "\t", 6)
        yield Entry(name, text, recording(prompt), recording(name))


def _numbered(lines: list[str]) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _fields(number: int, line: str, separator: str, *counts: int) -> list[str]:
    fields = line.strip().split(separator)
    if len(fields) not in counts:
        wanted = " or ".join(map(str, counts))
        raise ValueError(
            f"line {number}: expected {wanted} fields between {separator!r}, got {len(fields)}"
        )
    return fields
