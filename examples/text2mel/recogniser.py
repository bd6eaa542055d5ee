"""What was said: a small phoneme recogniser of true mels, and how much of a text it hears."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from examples.quickstart.audio import MELS
from examples.quickstart.corpus import Utterance
from examples.text2mel.data import generator_of

WIDTH = 128
DROPOUT = 0.1
UPDATES = 600
BATCH_SIZE = 16
LEARNING_RATE = 2e-3
NOISE = 0.1
"""Standard deviation of noise on the mels in training: it should not hang on the last detail."""
CHANGE = 2.0
"""What a change of phoneme costs in decoding, in nats."""
SILENCE = 0


class Recogniser(nn.Module):
    """Phoneme logits of every frame from 29 frames around it; mels `(B, N, 80)` to `(B, N, V)`."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.first = nn.Linear(MELS, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.dropout = nn.Dropout(DROPOUT)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(WIDTH, WIDTH, 5, padding=2 * dilation, dilation=dilation)
            for dilation in (1, 2, 4)
        )
        self.last = nn.Linear(WIDTH, symbols)

    def forward(self, mels: Tensor) -> Tensor:
        h = self.first(mels)
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            h = h + F.gelu(convolution(self.dropout(norm(h)).transpose(1, 2))).transpose(1, 2)
        return self.last(h)

    @torch.no_grad()
    def hear(self, mel: Tensor, start: int = 0) -> list[int]:
        """The phonemes of a mel `(N, 80)` from frame `start` on, pauses left out."""
        return spoken(best_path(self(mel[None])[0].log_softmax(-1))[start:])


def best_path(scores: Tensor) -> Tensor:
    """The phoneme of each frame `(N,)` of greatest score `(N, V)` in sum, each change at a cost."""
    total, came_from = scores[0], []
    stay = torch.arange(scores.shape[1])
    for score in scores[1:]:
        best, other = total.max(dim=0)
        changed = best - CHANGE > total
        came_from.append(torch.where(changed, other, stay))
        total = torch.where(changed, best - CHANGE, total) + score
    path = [total.argmax()]
    for back in reversed(came_from):
        path.append(back[path[-1]])
    return torch.stack(path[::-1])


def spoken(phonemes: Tensor) -> list[int]:
    """The sequence behind phonemes of frames `(N,)`: repeats are one, pauses are left out."""
    return [p for p in torch.unique_consecutive(phonemes).tolist() if p != SILENCE]


def train_recogniser(
    utterances: Sequence[Utterance], symbols: int, seed: int, updates: int = UPDATES
) -> Recogniser:
    """Cross-entropy of the phoneme under each frame."""
    generator = generator_of(seed, "recogniser")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Recogniser(symbols)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=updates, pct_start=0.1
    )
    for _ in range(updates):
        chosen = torch.randint(len(utterances), (BATCH_SIZE,), generator=generator).tolist()
        mels = pad_sequence([utterances[i].mel for i in chosen], batch_first=True)
        labels = pad_sequence(
            [utterances[i].phonemes for i in chosen], batch_first=True, padding_value=-1
        )
        noise = NOISE * torch.randn(mels.shape, generator=generator)
        loss = F.cross_entropy(model(mels + noise).flatten(0, 1), labels.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def accuracy(
    recogniser: Recogniser,
    mels: Sequence[Tensor],
    phonemes: Sequence[Tensor],
    prompts: Sequence[int],
) -> float:
    """1 - phoneme error rate: edits from what is heard to what was said, per phoneme said.

    Below 0 where more is inserted than was said.

    Args:
        mels: `(N_i, 80)` each, on the CPU, with their prompts.
        phonemes: Of the true frames, `(N_i,)`. Only the sequence counts, not where it lies.
        prompts: Frames of each mel that were given and do not count.
    """
    edits = said = 0
    for mel, truth, prompt in zip(mels, phonemes, prompts, strict=True):
        wanted = spoken(truth[prompt:])
        edits += edit_distance(recogniser.hear(mel, prompt), wanted)
        said += len(wanted)
    return 1 - edits / said


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Least insertions, deletions and substitutions that make `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
