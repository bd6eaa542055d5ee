"""What a model is given of utterances: the tasks that the clients train on, without their drops.

A student always sees its text, tokens and speaker: its teacher's guidance is what it learns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from imf_kernels import checks, masks
from imf_kernels.data import texts
from imf_kernels.data.utterances import Utterance
from imf_kernels.objectives.batch import Batch


@dataclass(frozen=True)
class Infilling:
    """F5-TTS: a span of each row is infilled from the rest of it and the text.

    Conditions: "prompt" `(B, N, C)`, the mel outside of the span; "text" ids `(B, L)`. The loss
    mask is the span.

    Attributes:
        shares: Between which the span's share of its row is drawn.
        drop_prompt: Share of the rows that have no prompt at all.
    """

    shares: tuple[float, float] = (0.7, 1.0)
    drop_prompt: float = 0.0

    def __post_init__(self) -> None:
        check_shares("shares", self.shares)
        checks.number("drop_prompt", self.drop_prompt, 0, 1)

    def __call__(self, utterances: list[Utterance], generator: torch.Generator) -> Batch:
        x1, lengths, names = _mels(utterances)
        text = texts.padded([feature(one, "text", "L") for one in utterances])
        span = spans(lengths, x1.shape[1], self.shares, generator)
        prompt = x1.masked_fill(span[:, :, None], 0.0)
        dropped = torch.rand(len(x1), generator=generator) < self.drop_prompt
        prompt = prompt.masked_fill(dropped[:, None, None], 0.0)
        return Batch(x1, lengths, {"prompt": prompt, "text": text}, loss_mask=span, names=names)


@dataclass(frozen=True)
class Continuation:
    """CosyVoice: what follows a prompt is generated from tokens and a speaker.

    Conditions: "prompt" `(B, N, C)`, the mel's first frames; "tokens" `(B, L)` and "token_lengths"
    `(B,)`; "speaker" `(B, S)`; "streaming", one coin for the batch. `Encoded` makes of them what
    the estimators are prepared with. The loss mask is what follows the prompt.

    Attributes:
        prompted: Share of the rows that have a prompt.
        longest: The prompt's share of its row is uniform, up to this one.
        streaming: Share of the batches whose attention is block-causal.
    """

    prompted: float = 0.5
    longest: float = 0.3
    streaming: float = 0.5

    def __post_init__(self) -> None:
        for name in ("prompted", "longest", "streaming"):
            checks.number(name, getattr(self, name), 0, 1)

    def __call__(self, utterances: list[Utterance], generator: torch.Generator) -> Batch:
        x1, lengths, names = _mels(utterances)
        tokens = [feature(one, "tokens", "m") for one in utterances]
        speakers = [feature(one, "speaker", "S") for one in utterances]
        streaming = float(torch.rand((), generator=generator)) < self.streaming
        prompted, share = torch.rand(2, len(x1), generator=generator, dtype=torch.float64)
        most = (self.longest * lengths.double()).long()
        heard = (share * (most + 1)).long().minimum(most) * (prompted < self.prompted)
        given = masks.inside(heard, x1.shape[1])
        conditions = {
            "prompt": x1.masked_fill(~given[:, :, None], 0.0),
            "tokens": pad_sequence(tokens, batch_first=True),
            "token_lengths": torch.tensor([len(row) for row in tokens]),
            "speaker": torch.stack(speakers),
            "streaming": streaming,
        }
        mask = masks.inside(lengths, x1.shape[1]) & ~given
        return Batch(x1, lengths, conditions, loss_mask=mask, names=names)


def spans(
    lengths: Tensor,
    frames: int,
    shares: tuple[float, float],
    generator: torch.Generator | None = None,
) -> Tensor:
    """One span per row, of a share of its length drawn from `shares`: bool `(B, frames)`.

    The draws are F5-TTS's, in its order; without a generator from torch's random state.
    """
    share = torch.zeros(lengths.shape, device=lengths.device).uniform_(*shares, generator=generator)
    size = (share * lengths).long()
    place = torch.rand(share.shape, generator=generator, device=lengths.device)
    start = ((lengths - size) * place).long()
    frame = torch.arange(frames, device=lengths.device)
    return (frame >= start[:, None]) & (frame < (start + size)[:, None])


def check_shares(name: str, shares: tuple[float, float]) -> None:
    """Raises unless these are two ascending numbers in [0, 1]."""
    if not isinstance(shares, Sequence) or len(shares) != 2:
        raise ValueError(f"{name}: expected two shares, got {shares!r}")
    for share in shares:
        checks.number(name, share, 0, 1)
    if shares[0] > shares[1]:
        raise ValueError(f"{name}: expected ascending shares, got {shares!r}")


def feature(utterance: Utterance, name: str, *dims: int | str) -> Tensor:
    """A feature of its shape.

    Raises:
        ValueError: none, or another shape, naming the utterance.
    """
    if name not in utterance.features:
        raise ValueError(
            f"{utterance.name}: expected a feature {name!r}, got {sorted(utterance.features)}"
        )
    value = utterance.features[name]
    checks.shape(f"{name} of {utterance.name}", value, *dims)
    return value


def _mels(utterances: list[Utterance]) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Mels `(B, N, C)`, their lengths and names."""
    lengths = torch.tensor([len(one.mel) for one in utterances])
    x1 = pad_sequence([one.mel for one in utterances], batch_first=True)
    return x1, lengths, tuple(one.name for one in utterances)
