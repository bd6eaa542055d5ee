"""What CosyVoice's estimators are prepared with, of tokens and speakers."""

from __future__ import annotations

from dataclasses import replace

from imf_kernels import checks
from imf_kernels.models import TokenEncoder
from imf_kernels.objectives.batch import Batch


class Encoded:
    """`finish(batch)`: of a `Continuation`'s batch, the same with "mu" and "spks".

    They are made where the encoder is, without gradient; it streams if the batch does.
    """

    def __init__(self, encoder: TokenEncoder) -> None:
        if not isinstance(encoder, TokenEncoder):
            raise TypeError(f"encoder: expected a TokenEncoder, got {type(encoder).__name__}")
        self.encoder = encoder

    def __call__(self, batch: Batch) -> Batch:
        given = dict(batch.conditions)
        tokens, lengths = given.pop("tokens"), given.pop("token_lengths")
        mu, _ = self.encoder(tokens, lengths, streaming=given["streaming"])
        checks.shape("mu", mu, *batch.x1.shape)
        given |= {"mu": mu, "spks": self.encoder.speakers(given.pop("speaker"))}
        return replace(batch, conditions=given)
