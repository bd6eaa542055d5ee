"""Texts as ids, the way F5-TTS has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from imf_kernels import checks

PADDING = -1
"""The id behind a row's text."""


def ids(text: str | Sequence[str], vocab: Mapping[str, int] | None) -> Tensor:
    """Int64 `(L,)`: of a vocabulary's entries (0 for unknown ones), or without one UTF-8 bytes."""
    if vocab is None:
        return torch.tensor(list("".join(text).encode()), dtype=torch.int64)
    return torch.tensor([vocab.get(token, 0) for token in text], dtype=torch.int64)


def padded(lines: Sequence[Tensor]) -> Tensor:
    """Int64 `(rows, L)` of ids `(l,)`."""
    return pad_sequence(list(lines), batch_first=True, padding_value=PADDING)


def vocabulary(path: Path) -> dict[str, int]:
    """A token a line, whose number, from 0 on, is its id.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a vocabulary, got no file")
    with path.open(encoding="utf-8", newline="\n") as lines:
        vocab = {line.removesuffix("\n"): number for number, line in enumerate(lines)}
    if not vocab:
        raise ValueError(f"{path}: expected a token a line, got an empty file")
    return vocab


class Tokenizer:
    """`tokenizer(text)`: ids `(L,)`.

    Args:
        kind: "byte"; "char", which takes lists of tokens besides; or "pinyin", which is F5-TTS's
            own and needs it installed: Chinese becomes syllables, all else characters.
        vocab: `vocab.txt`, of the last two.
    """

    def __init__(self, kind: str, vocab: str | Path | None = None) -> None:
        checks.choice("tokenizer", kind, ("byte", "char", "pinyin"))
        if (kind == "byte") != (vocab is None):
            wanted = "none" if kind == "byte" else "a path"
            raise ValueError(f"vocab: expected {wanted} with tokenizer {kind!r}, got {vocab!r}")
        self.kind = kind
        self.vocab = None if vocab is None else vocabulary(Path(vocab))

    def __call__(self, text: str | Sequence[str]) -> Tensor:
        if self.kind == "pinyin":
            from f5_tts.model.utils import convert_char_to_pinyin

            (text,) = convert_char_to_pinyin(["".join(text)])
        return ids(text, self.vocab)
