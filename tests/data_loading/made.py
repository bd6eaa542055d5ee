"""A dataset made of numbers."""

import torch

from imf_kernels.data import Utterance


class Made:
    """Utterance i: its mel is i everywhere, its text is i, repeated."""

    def __init__(self, frames, channels=2):
        self.frames, self.channels = list(frames), channels
        self.names = [f"made_{i}" for i in range(len(self.frames))]

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, index):
        mel = torch.full((self.frames[index], self.channels), float(index))
        return Utterance(self.names[index], mel, {"text": torch.full((1 + index % 3,), index)})
