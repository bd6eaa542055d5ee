"""Utterances to batches as F5-TTS has them: text, a mel with a gap, and the gap to fill.

The text is the utterance's phoneme sequence, pauses included, without durations: every id gets an
equal share of the utterance's frames. What lies where is for the model to learn.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from examples.quickstart.corpus import Utterance
from imf_kernels import masks
from imf_kernels.objectives import Batch

SPAN = (0.7, 1.0)
"""Share of an utterance that training infills (F5-TTS's)."""


def spread_text(phonemes: Tensor, evenness: float = 1.0) -> Tensor:
    """The id at every frame when the sequence of `phonemes` `(N,)` is spread evenly over N frames.

    With `evenness` below 1 the borders lie that share of the way from their true places to the even
    ones: a curriculum for training.
    """
    ids, counts = torch.unique_consecutive(phonemes, return_counts=True)
    true = counts.cumsum(0).float()
    even = torch.arange(1, len(ids) + 1) * (len(phonemes) / len(ids))
    borders = torch.lerp(true, even, evenness)
    centres = torch.arange(len(phonemes)) + 0.5
    return ids[torch.searchsorted(borders, centres, right=True).clamp(max=len(ids) - 1)]


def collate(
    utterances: Sequence[Utterance], spans: Tensor, device: torch.device, evenness: float = 1.0
) -> Batch:
    """`spans`: first and last (exclusive) frame to generate of each utterance, int64 `(B, 2)`."""
    x1 = pad_sequence([u.mel for u in utterances], batch_first=True)
    frames = x1.shape[1]
    lengths = torch.tensor([len(u.mel) for u in utterances])
    span = masks.inside(spans[:, 1], frames) & ~masks.inside(spans[:, 0], frames)
    text = [spread_text(u.phonemes, evenness) for u in utterances]
    conditions = {
        "text": pad_sequence(text, batch_first=True, padding_value=-1),
        "prompt": x1.masked_fill(span[:, :, None], 0.0),
    }
    return Batch(
        x1=x1.to(device),
        lengths=lengths.to(device),
        conditions={name: value.to(device) for name, value in conditions.items()},
        loss_mask=span.to(device),
    )


def continuation(utterances: Sequence[Utterance], prompts: Tensor, device: torch.device) -> Batch:
    """All that follows the first `prompts` `(B,)` frames is to be generated."""
    lengths = torch.tensor([len(u.mel) for u in utterances])
    return collate(utterances, torch.stack([prompts, lengths], dim=1), device)


def random_spans(utterances: Sequence[Utterance], generator: torch.Generator) -> Tensor:
    """One gap of `SPAN` of each utterance, anywhere in it, `(B, 2)`."""
    lengths = torch.tensor([float(len(u.mel)) for u in utterances])
    share, place = torch.rand(2, len(utterances), generator=generator)
    wide = ((SPAN[0] + (SPAN[1] - SPAN[0]) * share) * lengths).round()
    start = (place * (lengths - wide)).floor()
    return torch.stack([start, start + wide], dim=1).long()


class TrainingBatches:
    """Batches of utterances of similar length; batch k is a function of the seed and k alone."""

    def __init__(
        self,
        utterances: Sequence[Utterance],
        batch_size: int,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        self.utterances, self.batch_size, self.seed = utterances, batch_size, seed
        self.device = device if device is not None else torch.device("cpu")
        self.epoch: int | None = None
        self.groups: list[list[int]] = []

    def __call__(self, k: int, evenness: float = 1.0) -> Batch:
        epoch, index = divmod(k, -(-len(self.utterances) // self.batch_size))
        if epoch != self.epoch:
            self.epoch, self.groups = epoch, self._shuffled(epoch)
        chosen = [self.utterances[i] for i in self.groups[index]]
        spans = random_spans(chosen, generator_of(self.seed, "spans", k))
        return collate(chosen, spans, self.device, evenness)

    def _shuffled(self, epoch: int) -> list[list[int]]:
        generator = generator_of(self.seed, "epoch", epoch)
        lengths = torch.tensor([float(len(u.mel)) for u in self.utterances])
        order = (lengths + 8 * torch.rand(len(lengths), generator=generator)).argsort().tolist()
        groups = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        return [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]


def generator_of(*key: object) -> torch.Generator:
    """A generator of its own for each use, seeded by what it is for."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
