"""Utterances to padded batches; the prompt is the head of an utterance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from examples.quickstart.corpus import Utterance
from imf_kernels import masks
from imf_kernels.objectives import Batch

MAX_PROMPT = 0.3
"""Prompts are at most this share of an utterance (CosyVoice's training: U{0 .. .3 L})."""


def collate(utterances: Sequence[Utterance], prompts: Tensor, device: torch.device) -> Batch:
    """`prompts`: prompt frames per utterance, int64 `(B,)`."""
    x1 = pad_sequence([u.mel for u in utterances], batch_first=True)
    frames = x1.shape[1]
    lengths = torch.tensor([len(u.mel) for u in utterances])
    is_prompt = masks.inside(prompts, frames)
    conditions = {
        "phonemes": pad_sequence([u.phonemes for u in utterances], batch_first=True),
        "speakers": torch.tensor([u.speaker for u in utterances]),
        "prompt": torch.where(is_prompt[:, :, None], x1, 0.0),
    }
    return Batch(
        x1=x1.to(device),
        lengths=lengths.to(device),
        conditions={name: value.to(device) for name, value in conditions.items()},
        loss_mask=(masks.inside(lengths, frames) & ~is_prompt).to(device),
    )


def random_prompts(utterances: Sequence[Utterance], generator: torch.Generator) -> Tensor:
    """No prompt for half of the rows, else up to `MAX_PROMPT` of the utterance."""
    lengths = torch.tensor([float(len(u.mel)) for u in utterances])
    draw = torch.rand(2, len(utterances), generator=generator)
    return torch.where(draw[0] < 0.5, 0.0, draw[1] * MAX_PROMPT * lengths).long()


def training_batches(
    utterances: Sequence[Utterance],
    batch_size: int,
    generator: torch.Generator,
    device: torch.device,
) -> Iterator[Batch]:
    """Endless batches of utterances of similar length, in random order."""
    by_length = sorted(utterances, key=lambda u: len(u.mel))
    groups = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    while True:
        for i in torch.randperm(len(groups), generator=generator).tolist():
            yield collate(groups[i], random_prompts(groups[i], generator), device)
