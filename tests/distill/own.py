"""A model, a dataset and a collate of one's own, as a document names them."""

import torch
from torch import nn

from imf_kernels import Batch
from imf_kernels.data import Utterance
from imf_kernels.models import TimeEmbedding, TimeEmbedMixer


class Model(nn.Module):
    channels = 4

    def __init__(self, dim: int = 16, mixer: bool = False) -> None:
        super().__init__()
        self.time = TimeEmbedding(dim)
        self.mixer = TimeEmbedMixer(dim) if mixer else None
        self.inside, self.mu = nn.Linear(4, dim), nn.Linear(4, dim)
        self.out = nn.Linear(dim, 4)

    def prepare(self, mu, lengths, guided=False):
        branches = [mu, torch.zeros_like(mu)] if guided else [mu]
        return {"mu": self.mu(torch.cat(branches)), "lengths": lengths.repeat(len(branches))}

    def forward(self, x, t, r, cond):
        e = self.time(t) if self.mixer is None else self.mixer(self.time(t), self.time(r))
        h = (self.inside(x) + e[:, None]).repeat(len(cond["mu"]) // len(x), 1, 1)
        return self.out(torch.tanh(h + cond["mu"]))

    def student(self):
        student = Model(self.out.in_features, mixer=True)
        student.load_state_dict(self.state_dict(), strict=False)
        return student


def model(dim: int = 16) -> Model:
    torch.manual_seed(0)
    return Model(dim)


class Noises:
    """Utterances that are noise; `channels` as asked for."""

    def __init__(self, count: int = 24, channels: int = 4) -> None:
        self.count, self.channels = count, channels
        self.frames = [5 + i % 7 for i in range(count)]
        self.names = [f"noise_{i}" for i in range(count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Utterance:
        generator = torch.Generator().manual_seed(index)
        mel = torch.randn(self.frames[index], self.channels, generator=generator)
        return Utterance(self.names[index], mel, {"mu": 0.5 * mel})


def collate():
    def collated(utterances, generator):
        frames = max(len(u.mel) for u in utterances)
        x1, mu = torch.zeros(2, len(utterances), frames, 4)
        for row, u in enumerate(utterances):
            x1[row, : len(u.mel)], mu[row, : len(u.mel)] = u.mel, u.features["mu"]
        lengths = torch.tensor([len(u.mel) for u in utterances])
        return Batch(x1, lengths, {"mu": mu}, names=tuple(u.name for u in utterances))

    return collated
