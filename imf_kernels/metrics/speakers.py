"""How alike two voices are: the cosine of their embeddings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from imf_kernels.metrics import audio


class Similarity:
    """`similarity(generated, prompt)`, in [-1, 1]; 1 is best.

    Args:
        embed: A clip `(1, samples)` to an embedding `(1, D)`.
        device: Where clips are moved to.
        shortest: Samples that a clip must have.
    """

    def __init__(
        self,
        embed: Callable[[Tensor], Tensor],
        device: torch.device | str,
        shortest: int = audio.SHORTEST,
    ) -> None:
        self._embed = embed
        self.device = torch.device(device)
        self.shortest = shortest

    @torch.inference_mode()
    def embed(self, clip: Tensor) -> Tensor:
        """The voice of a clip `(samples,)`, float32 at 16 kHz: `(D,)`."""
        audio.check("clip", clip, self.shortest)
        return self._embed(clip[None].to(self.device))[0]

    def __call__(self, generated: Tensor, prompt: Tensor) -> float:
        """Of two clips `(samples,)`, float32 at 16 kHz, of any lengths."""
        return F.cosine_similarity(self.embed(generated), self.embed(prompt), dim=0).item()
