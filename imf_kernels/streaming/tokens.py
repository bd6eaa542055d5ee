"""A stream that takes speech tokens: a token encoder's stream in front of one of frames."""

from __future__ import annotations

from torch import Tensor

from imf_kernels import checks
from imf_kernels.models import TokenEncoder
from imf_kernels.models.token_encoder import FRAMES_PER_TOKEN
from imf_kernels.streaming.frames import Stream


class TokenStream:
    """One utterance: tokens go in by `feed`, the prompt's first; mel frames come out by `take`.

    The encoder looks a few tokens ahead, so the last ones wait for more, or for `finish`. Tokens of
    the past are not encoded again.

    Args:
        encoder: The flow's own.
        frames: A stream that nothing has been fed to; this one speaks for it from now on.

    Attributes:
        frames: The stream of frames, which `Streams.step` knows.
        max_tokens: Its bound, the prompt's tokens included.
        nbytes: Its declared bytes, those of `frames` included.
    """

    def __init__(self, encoder: TokenEncoder, frames: Stream) -> None:
        for name, value, wanted in (("encoder", encoder, TokenEncoder), ("frames", frames, Stream)):
            if not isinstance(value, wanted):
                got = type(value).__name__
                raise TypeError(f"{name}: expected a {wanted.__name__}, got {got}")
        if encoder.channels != frames.channels:
            raise ValueError(
                f"encoder: expected {frames.channels} channels, got {encoder.channels}"
            )
        checks.same_device("encoder", encoder.input_embedding.weight, frames.device)
        if frames.fed:
            raise ValueError(f"frames: expected a stream without any, got one of {frames.fed}")
        self.frames = frames
        self._tokens = encoder.open(max(frames.max_frames // FRAMES_PER_TOKEN, 1))
        self.max_tokens = self._tokens.max_tokens
        self.nbytes = frames.nbytes + self._tokens.nbytes

    def feed(self, tokens: Tensor) -> None:
        """Append tokens, integer `(n,)`, any n.

        Raises:
            RuntimeError: the stream is finished or closed.
            ValueError, TypeError: tokens beyond `max_tokens`, or what are none.
        """
        self.frames.feed(self._tokens.feed(tokens))

    def finish(self, *, full_attention: bool = False) -> None:
        """No more tokens will come; see `Stream.finish`.

        With `full_attention`, all tokens are encoded once more without a mask as well.

        Raises:
            RuntimeError: the stream is finished or closed.
            ValueError: fewer tokens than the prompt has frames of.
        """
        if FRAMES_PER_TOKEN * self._tokens.fed < self.frames.prompt_frames:
            raise ValueError(
                f"tokens: expected those of the prompt's {self.frames.prompt_frames} frames, "
                f"got {self._tokens.fed}"
            )
        mu = self._tokens.finish(full_attention=full_attention)
        if full_attention:
            self.frames.finish(full_attention=True, mu=mu)
        else:
            self.frames.feed(mu)
            self.frames.finish()

    @property
    def busy(self) -> bool:
        """See `Stream.busy`."""
        return self.frames.busy

    def take(self) -> Tensor:
        """See `Stream.take`."""
        return self.frames.take()

    def drain(self) -> Tensor:
        """See `Stream.drain`."""
        return self.frames.drain()

    def close(self) -> None:
        """Give the memory back; what was not taken is lost. Closing again does nothing."""
        self._tokens.close()
        self.frames.close()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
