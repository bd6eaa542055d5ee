"""What stands between speech tokens and `mu`, for both CosyVoice families; and `spks`.

Frozen: it has no gradients and no dropout. A stream of tokens is encoded as it arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imf_kernels import checks, masks
from imf_kernels.models import state_dicts
from imf_kernels.models.conformer import Span, UpsampleConformer
from imf_kernels.models.estimator import checked_lengths
from imf_kernels.models.lookahead import Lookahead, Past, Tail

CHUNK = 25
"""Tokens per block of the clients' streaming mask; no state dict tells it."""
FRAMES_PER_TOKEN = 2


class TokenEncoder(nn.Module):
    """Tokens to frame-level features `mu`; `speakers` makes `spks` of speaker embeddings."""

    def __init__(self, vocab: int, dim: int, channels: int, speaker: int, chunk: int) -> None:
        super().__init__()
        checks.positive_int("chunk", chunk)
        self.chunk = chunk
        self.input_embedding = nn.Embedding(vocab, dim)
        self.spk_embed_affine_layer = nn.Linear(speaker, channels)

    @staticmethod
    def from_state_dict(state_dict: Mapping[str, Tensor], *, chunk: int = CHUNK) -> TokenEncoder:
        """The encoder of a client's flow (CosyVoice2, Chatterbox, CosyVoice3), float32 on the CPU.

        Args:
            state_dict: The client's own keys, from `input_embedding.weight` on; a common prefix is
                taken off, and the estimator's, under `decoder.`, are left out.
            chunk: Tokens per block of the streaming mask.

        Raises:
            ValueError: missing and unexpected keys (the load is strict); a key with another shape
                than expected, no floating dtype, or weights that are not finite.
        """
        own = state_dicts.without_prefix(state_dict, _TOKENS)
        own = {name: value for name, value in own.items() if not name.startswith("decoder.")}
        shapes = {name: tuple(value.shape) for name, value in own.items()}
        vocab, _ = state_dicts.shape(shapes, _TOKENS, 2)
        channels, speaker = state_dicts.shape(shapes, _SPEAKER, 2)
        family = ConformerEncoder if "encoder_proj.weight" in own else LookaheadEncoder
        sizes = {"vocab": vocab, "channels": channels, "speaker": speaker, **family.sizes(shapes)}
        blocks = sum(size for name, size in sizes.items() if name.endswith("blocks"))
        encoder = state_dicts.load(lambda: family(**sizes, chunk=chunk), blocks, own)
        return encoder.eval().requires_grad_(False)

    # -- a family's own -------------------------------------------------------------------------

    @property
    def lookahead(self) -> int:
        """How many tokens after it a token's frames depend on."""
        raise NotImplementedError

    def embedded(self, tokens: Tensor) -> Tensor:
        """What the lookahead reads, each token alone: `(B, L)` to `(B, L, dim)`."""
        raise NotImplementedError

    def frames(
        self, x: Tensor, count: int, span: Callable[[int], Span], past: Past | None = None
    ) -> Tensor:
        """The first `count` of embedded tokens, the others being context, to `(B, 2 count, C)`."""
        raise NotImplementedError

    def past(self, tokens: int) -> Past:
        """Room for what `frames` needs of earlier tokens of a row, up to so many."""
        raise NotImplementedError

    # -- common ---------------------------------------------------------------------------------

    @property
    def channels(self) -> int:
        return self.spk_embed_affine_layer.out_features

    @property
    def device(self) -> torch.device:
        return self.input_embedding.weight.device

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        streaming: bool = False,
        final: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """The features of whole rows.

        Args:
            tokens: Ids, integer `(B, L)`, prompt first; negative ones are taken for 0.
            lengths: Tokens per row, integer `(B,)`; None: all L.
            streaming: No token attends beyond its own block of `chunk` tokens.
            final: Otherwise each row's last `lookahead` tokens are context of the others only.

        Returns:
            `mu` `(B, 2 L, C)`, zero beyond each row's frames, and these, int64 `(B,)`; without
            `final` both are those of `lookahead` tokens fewer.

        Raises:
            ValueError, TypeError: naming the argument, the expected and the given value.
        """
        checks.shape("tokens", tokens, "B", "L")
        tokens = self.ids(tokens)
        valid = checked_lengths(lengths, tokens)
        count, context = tokens.shape[1], 0 if final else self.lookahead
        if count <= context:
            raise ValueError(f"tokens: expected more than {context} a row, got {count}")
        if checks.readable(valid) and bool((valid <= context).any()):
            raise ValueError(f"lengths: expected more than {context} tokens, got {valid.tolist()}")
        outside = ~masks.inside(valid, count)[:, :, None]
        x = self.embedded(tokens).masked_fill(outside, 0.0)
        valid, count = valid - context, count - context

        def span(rate: int) -> Span:
            return Span.whole(rate * valid, rate * count, rate * self.chunk if streaming else None)

        mu, frames = self.frames(x, count, span), FRAMES_PER_TOKEN * valid
        return mu.masked_fill(~masks.inside(frames, mu.shape[1])[:, :, None], 0.0), frames

    @torch.no_grad()
    def speakers(self, embedding: Tensor) -> Tensor:
        """Speaker embeddings `(B, S)`, of any length but 0, to `spks` `(B, C)`."""
        checks.shape("embedding", embedding, "B", self.spk_embed_affine_layer.in_features)
        checks.floating("embedding", embedding)
        weight = self.spk_embed_affine_layer.weight
        return self.spk_embed_affine_layer(F.normalize(embedding, dim=1).to(weight))

    def open(self, max_tokens: int) -> EncoderStream:
        """Encode one row's tokens as they come, up to `max_tokens` with the prompt's."""
        return EncoderStream(self, max_tokens)

    def ids(self, tokens: Tensor) -> Tensor:
        """Tokens as given to rows of the embedding, int64 on its device."""
        checks.dtype("tokens", tokens, torch.int64, torch.int32)
        vocab = self.input_embedding.num_embeddings
        if checks.readable(tokens) and tokens.numel() and int(tokens.max()) >= vocab:
            raise ValueError(f"tokens: expected ids below {vocab}, got {int(tokens.max())}")
        return tokens.to(device=self.device, dtype=torch.int64).clamp(min=0)


class EncoderStream:
    """The streaming answer `encoder(tokens, streaming=True)` of one row, as its tokens come.

    Whole blocks of `encoder.chunk` tokens, counted from the first, are encoded once the lookahead
    after them is known, each at its own cost and that of attention to the past. The frames are the
    same bits however the tokens are fed.

    Attributes:
        max_tokens: The bound.
        nbytes: What it holds for them, from the beginning until it is closed.
    """

    def __init__(self, encoder: TokenEncoder, max_tokens: int) -> None:
        checks.positive_int("max_tokens", max_tokens)
        self.encoder, self.max_tokens = encoder, max_tokens
        with torch.inference_mode(False):  # what is made inside may only be written inside
            self._past: Past | None = encoder.past(max_tokens)
            self._tokens = torch.empty(1, max_tokens, dtype=torch.int64, device=encoder.device)
        self._fed = self._encoded = 0
        held = [self._tokens, *(kept.values for layer in self._past.values() for kept in layer)]
        self.nbytes = sum(tensor.nbytes for tensor in held)

    @property
    def fed(self) -> int:
        """Tokens that it was given."""
        return self._fed

    def feed(self, tokens: Tensor) -> Tensor:
        """Take tokens, integer `(n,)`, and return the frames that are final by them, `(m, C)`.

        Raises:
            ValueError, TypeError: wrong tokens, or more than `max_tokens`; none is taken then.
            RuntimeError: closed or finished.

        If anything else is raised while encoding, the stream is closed: what it keeps is not whole.
        """
        self._expect_open()
        checks.shape("tokens", tokens, "n")
        tokens, free = self.encoder.ids(tokens), self.max_tokens - self._fed
        if tokens.shape[0] > free:
            raise ValueError(
                f"tokens: expected at most {free} more within max_tokens = {self.max_tokens}, "
                f"got {tokens.shape[0]}"
            )
        before, self._fed = self._fed, self._fed + tokens.shape[0]
        self._tokens[0, before : self._fed] = tokens
        ready, chunk = self._fed - self.encoder.lookahead, self.encoder.chunk
        return self._encode(max(ready // chunk * chunk, 0))

    def finish(self, *, full_attention: bool = False) -> Tensor:
        """The frames that are left, `(m, C)`; closes the stream.

        With `full_attention`, instead, the frames of all tokens as `encoder(tokens)` has them:
        what the clients make of a stream's last part.

        Raises:
            RuntimeError: closed or finished.
        """
        self._expect_open()
        if full_attention and self._fed:
            mu = self.encoder(self._tokens[:, : self._fed])[0][0]
        else:
            mu = self._encode(self._fed)
        self.close()
        return mu

    def close(self) -> None:
        """Let go of what it holds; the second time, nothing happens."""
        self._past, self._tokens = None, self._tokens[:, :0].clone()

    def _expect_open(self) -> None:
        if self._past is None:
            raise RuntimeError("expected an open stream of tokens, this one is closed")

    def _encode(self, end: int) -> Tensor:
        """The frames of the tokens up to `end`, of which whole blocks come before."""
        try:
            return self._encoded_up_to(end)
        except BaseException:
            self.close()
            raise

    @torch.no_grad()
    def _encoded_up_to(self, end: int) -> Tensor:
        encoder, weight = self.encoder, self.encoder.spk_embed_affine_layer.weight
        mu = [weight.new_empty(0, encoder.channels)]
        while self._encoded < end:
            start, count = self._encoded, min(encoder.chunk, end - self._encoded)
            context = min(start + count + encoder.lookahead, self._fed)

            def span(rate: int, start: int = start, count: int = count) -> Span:
                chunk = rate * encoder.chunk
                return Span.part(rate * start, rate * count, chunk, encoder.device)

            x = encoder.embedded(self._tokens[:, start:context])
            mu.append(encoder.frames(x, count, span, self._past)[0])
            self._encoded += count
        return torch.cat(mu)


class ConformerEncoder(TokenEncoder):
    """CosyVoice2's, and Chatterbox's."""

    def __init__(
        self,
        *,
        vocab: int,
        dim: int,
        channels: int,
        speaker: int,
        heads: int,
        inner: int,
        blocks: int,
        up_blocks: int,
        lookahead: int,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__(vocab, dim, channels, speaker, chunk)
        self.encoder = UpsampleConformer(
            dim, heads, inner, blocks, up_blocks, lookahead, FRAMES_PER_TOKEN
        )
        self.encoder_proj = nn.Linear(dim, channels)

    @staticmethod
    def sizes(shapes: state_dicts.Shapes) -> dict[str, int]:
        blocks = "encoder.encoders."
        dim, _, taps = state_dicts.shape(shapes, "encoder.pre_lookahead_layer.conv1.weight", 3)
        heads, _ = state_dicts.shape(shapes, f"{blocks}0.self_attn.pos_bias_u", 2)
        inner, _ = state_dicts.shape(shapes, f"{blocks}0.feed_forward.w_1.weight", 2)
        return {
            "dim": dim,
            "heads": heads,
            "inner": inner,
            "blocks": state_dicts.count(shapes, blocks),
            "up_blocks": state_dicts.count(shapes, "encoder.up_encoders."),
            "lookahead": taps - 1,
        }

    @property
    def lookahead(self) -> int:
        return self.encoder.pre_lookahead_layer.ahead

    def embedded(self, tokens: Tensor) -> Tensor:
        return self.encoder.embed(self.input_embedding(tokens))

    def frames(
        self, x: Tensor, count: int, span: Callable[[int], Span], past: Past | None = None
    ) -> Tensor:
        return self.encoder_proj(self.encoder(x, count, span, past))

    def past(self, tokens: int) -> Past:
        return self.encoder.past(tokens, self.chunk)


class LookaheadEncoder(TokenEncoder):
    """CosyVoice3's: the lookahead alone, over embeddings as wide as a mel frame."""

    def __init__(
        self,
        *,
        vocab: int,
        channels: int,
        speaker: int,
        inner: int,
        lookahead: int,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__(vocab, channels, channels, speaker, chunk)
        self.pre_lookahead_layer = Lookahead(channels, inner, lookahead)

    @staticmethod
    def sizes(shapes: state_dicts.Shapes) -> dict[str, int]:
        inner, _, taps = state_dicts.shape(shapes, "pre_lookahead_layer.conv1.weight", 3)
        return {"inner": inner, "lookahead": taps - 1}

    @property
    def lookahead(self) -> int:
        return self.pre_lookahead_layer.ahead

    def embedded(self, tokens: Tensor) -> Tensor:
        return self.input_embedding(tokens)

    def frames(
        self, x: Tensor, count: int, span: Callable[[int], Span], past: Past | None = None
    ) -> Tensor:
        h = self.pre_lookahead_layer(x, count, past)
        return h.repeat_interleave(FRAMES_PER_TOKEN, dim=1)

    def past(self, tokens: int) -> Past:
        conv: Any = self.pre_lookahead_layer.conv2
        return {conv: [Tail(conv)]}


_TOKENS = "input_embedding.weight"
_SPEAKER = "spk_embed_affine_layer.weight"
