"""Texts as ids, the way F5-TTS has them."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from imf_kernels import checks
from imf_kernels.models import checkpoints

PADDING = -1
"""The id behind a row's text."""
FIRST, UNKNOWN = 100, 0.05
"""So many texts are looked at, and such a share of their tokens may be unknown."""


def ids(text: str | Sequence[str], vocab: Mapping[str, int] | None) -> Tensor:
    """Int64 `(L,)`: of a vocabulary's entries (0 for unknown ones), or without one UTF-8 bytes."""
    if vocab is None:
        return torch.tensor(list("".join(text).encode()), dtype=torch.int64)
    return torch.tensor([vocab.get(token, 0) for token in text], dtype=torch.int64)


def padded(lines: Sequence[Tensor]) -> Tensor:
    """Int64 `(rows, L)` of ids `(l,)`."""
    return pad_sequence(list(lines), batch_first=True, padding_value=PADDING)


def vocabulary(path: str | Path) -> dict[str, int]:
    """A token a line, whose number, from 0 on, is its id.

    Raises:
        FileNotFoundError, ValueError, ImportError: naming the file, see `checkpoints.local`.
    """
    file = checkpoints.local(path) if str(path).startswith(checkpoints.HUB) else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path}: expected a vocabulary, got no file")
    with file.open(encoding="utf-8", newline="\n") as lines:
        vocab = {line.removesuffix("\n"): number for number, line in enumerate(lines)}
    if not vocab:
        raise ValueError(f"{path}: expected a token a line, got an empty file")
    return vocab


class Tokenizer:
    """`tokenizer(text)`: ids `(L,)`.

    Args:
        kind: "byte"; "char", which takes lists of tokens besides; or "pinyin", which is F5-TTS's
            own and needs it installed: Chinese becomes syllables, all else characters.
        vocab: `vocab.txt` of the last two, on disk or as "hf://owner/repo/folder/vocab.txt".
    """

    def __init__(self, kind: str, vocab: str | Path | None = None) -> None:
        checks.choice("tokenizer", kind, ("byte", "char", "pinyin"))
        if kind == "pinyin" and importlib.util.find_spec("f5_tts") is None:
            raise ImportError("tokenizer: 'pinyin' is F5-TTS's own: pip install f5-tts")
        if (kind == "byte") != (vocab is None):
            wanted = "none" if kind == "byte" else "a path"
            raise ValueError(f"vocab: expected {wanted} with tokenizer {kind!r}, got {vocab!r}")
        self.kind = kind
        self.vocab = None if vocab is None else vocabulary(vocab)

    def __call__(self, text: str | Sequence[str]) -> Tensor:
        return ids(self._tokens(text), self.vocab)

    def check(self, lines: Iterable[str | Sequence[str]]) -> None:
        """Warn if more than a few of the first texts' tokens are unknown: id 0, F5-TTS's space."""
        if self.vocab is None:
            return
        tokens = [token for line in islice(lines, FIRST) for token in self._tokens(line)]
        unknown = [token for token in tokens if token not in self.vocab]
        if len(unknown) > UNKNOWN * len(tokens):
            warnings.warn(
                f"tokenizer: {len(unknown)} of the first {len(tokens)} tokens of {self.kind!r} are "
                f"not in the vocabulary, such as {sorted(set(unknown))[:5]}, and become id 0. "
                "F5-TTS's released checkpoints have 'pinyin'",
                RuntimeWarning,
                stacklevel=3,
            )

    def _tokens(self, text: str | Sequence[str]) -> str | Sequence[str]:
        if self.kind == "pinyin":
            from f5_tts.model.utils import convert_char_to_pinyin

            (text,) = convert_char_to_pinyin(["".join(text)])
        return text
