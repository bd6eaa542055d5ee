"""Streams of tokens: the whole answer of encoder and solve, however the tokens are fed."""

import random

import pytest
import torch

from imf_kernels import sampler
from imf_kernels.models import TokenEncoder
from imf_kernels.streaming import Streams, TokenStream
from tests.models.test_token_encoder import golden
from tests.models.tools import relative_rms, small_model

CHUNK, TOKENS, PROMPT = 3, 26, 5  # tokens a block; of the prompt those of PROMPT frames
ENCODERS = ["cosy2_encoder", "cosy3_lookahead"]


@pytest.fixture(params=ENCODERS)
def encoder(request):
    _, _, state = golden(request.param)
    return TokenEncoder.from_state_dict(state, chunk=CHUNK)


class Utterance:
    """Tokens, voice and noise, and the pool that they are streamed in."""

    def __init__(self, encoder, tokens=TOKENS, seed=0):
        generator = torch.Generator().manual_seed(seed)
        channels, vocab = encoder.channels, encoder.input_embedding.num_embeddings
        self.encoder, self.max_frames = encoder, 2 * tokens
        self.tokens = torch.randint(vocab, (tokens,), generator=generator)
        self.spks = torch.randn(channels, generator=generator)
        self.prompt = torch.randn(PROMPT, channels, generator=generator)
        self.noise = torch.randn(2 * tokens, channels, generator=generator)
        self.model = small_model("cosyvoice3", channels=channels, chunk=2 * CHUNK).student().eval()
        self.streams = Streams(self.model.requires_grad_(False), "cosine", 2, frames=2 * tokens)

    def open(self):
        frames = self.streams.open(
            self.max_frames, spks=self.spks, noise=self.noise, prompt=self.prompt
        )
        return TokenStream(self.encoder, frames)

    def whole(self, streaming):
        """Of all tokens at once, with or without the streaming masks."""
        mu, _ = self.encoder(self.tokens[None], streaming=streaming)
        prompt = torch.zeros_like(mu)
        prompt[0, :PROMPT] = self.prompt
        cond = self.model.prepare(prompt, mu=mu, spks=self.spks[None], streaming=streaming)
        return sampler.sample(self.model, self.noise[None], cond, "cosine", nfe=2)[0, PROMPT:]

    def feed(self, stream, draw):
        """All tokens, in pieces; the mel that came of them by then."""
        mels, rest = [], self.tokens
        while len(rest):
            n = draw.randint(1, 9)
            stream.feed(rest[:n])
            rest = rest[n:]
            if draw.random() < 0.6:
                mels.append(stream.drain())
        return [*mels, stream.drain()]


@pytest.mark.parametrize("seed", range(3))
def test_any_feeding_is_the_whole_answer(encoder, seed):
    said = Utterance(encoder, TOKENS + seed, seed)
    with said.open() as stream:
        mels = said.feed(stream, random.Random(seed))
        assert sum(map(len, mels)) >= 2 * (said.max_frames // 2 - 3 - CHUNK) - PROMPT
        stream.finish()
        got = torch.cat([*mels, stream.drain()])
    assert relative_rms(got, said.whole(streaming=True)) <= 1e-5


def test_the_last_part_in_full_attention(encoder):
    said = Utterance(encoder)
    with said.open() as stream:
        before = torch.cat(said.feed(stream, random.Random(0)))
        stream.finish(full_attention=True)
        after = stream.drain()
    masked, whole = said.whole(streaming=True), said.whole(streaming=False)
    assert 0 < len(after) < len(whole)
    assert relative_rms(before, masked[: len(before)]) <= 1e-5
    assert relative_rms(after, whole[len(before) :]) <= 1e-5
    assert relative_rms(after, masked[len(before) :]) > 1e-3


def test_bounds_and_closing(encoder):
    said = Utterance(encoder)
    stream = said.open()
    assert stream.max_tokens == TOKENS
    assert stream.nbytes > stream.frames.nbytes
    with pytest.raises(ValueError, match=f"tokens: expected at most {TOKENS} more"):
        stream.feed(torch.zeros(TOKENS + 1, dtype=torch.int64))
    stream.feed(said.tokens)
    assert stream.busy
    assert said.streams.step() == []
    assert said.streams.step() == [stream.frames]
    assert len(stream.take())
    with pytest.raises(ValueError, match="frames: expected a stream without any"):
        TokenStream(encoder, stream.frames)
    with pytest.raises(TypeError, match="frames: expected a Stream, got Streams"):
        TokenStream(encoder, said.streams)
    stream.close()
    stream.close()
    with pytest.raises(RuntimeError, match="closed"):
        stream.feed(said.tokens)
    with said.open() as stream, pytest.raises(ValueError, match=r"encoder: expected .* channels"):
        TokenStream(
            TokenEncoder.from_state_dict(golden("cosy2_encoder")[2]),
            Streams(small_model("cosyvoice3").student(), nfe=1, frames=10).open(
                10, spks=torch.zeros(12), noise=torch.Generator()
            ),
        )


def test_a_failure_while_encoding_closes_the_encoder(encoder, monkeypatch):
    said, frames = Utterance(encoder), encoder.frames
    calls = []

    def fails_the_second_time(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return frames(*args)

    monkeypatch.setattr(encoder, "frames", fails_the_second_time)
    with said.open() as stream:
        with pytest.raises(MemoryError):
            stream.feed(said.tokens)
        with pytest.raises(RuntimeError, match="closed"):
            stream.feed(said.tokens)


def test_a_prompt_without_its_tokens_may_still_get_them(encoder):
    said = Utterance(encoder)
    with said.open() as stream:
        stream.feed(said.tokens[:2])
        with pytest.raises(ValueError, match=r"tokens: expected those of .* 5 frames, got 2"):
            stream.finish()
        stream.feed(said.tokens[2:])
        stream.finish()
        assert relative_rms(stream.drain(), said.whole(streaming=True)) <= 1e-5


def test_features_for_the_last_part_are_checked(encoder):
    said = Utterance(encoder)
    frames = said.streams.open(10, spks=said.spks, noise=said.noise[:10])
    frames.feed(torch.zeros(6, encoder.channels))
    with pytest.raises(ValueError, match="mu: expected None without full_attention"):
        frames.finish(mu=torch.zeros(6, encoder.channels))
    with pytest.raises(ValueError, match="mu: expected conditions of 6 to 10 frames, got 5"):
        frames.finish(full_attention=True, mu=torch.zeros(5, encoder.channels))
