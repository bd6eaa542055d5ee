"""Streams: the whole solve under the streaming mask, whatever the feeding and the company."""

import random
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imf_kernels import sampler
from imf_kernels.models import Baked, Cache, Modulation
from imf_kernels.streaming import Full, Streams
from tests.models.test_cosyvoice2 import small_unet
from tests.models.tools import conditions, one_row, relative_rms, small_model

CHUNK, CHANNELS = 5, 12
FAMILIES = ["unet", "dit"]
SOLVES = [(1, None), (3, None), (3, 1.7)]
BOUND = 1e-5


def build(family, **switches):
    """A model whose mixer, if it has one, listens to r."""
    if family == "unet":
        model = small_unet(chunk=CHUNK, mid_blocks=1, depth=1, **switches)
    else:
        model = small_model("cosyvoice3", chunk=CHUNK, **switches)
    return model.requires_grad_(False)


MODELS = {family: {w: build(family, mixer=w is None) for w in (None, 1.7)} for family in FAMILIES}
"""By guidance: a student, or a teacher's model."""


@pytest.fixture(autouse=True)
def one_thread():
    """For models this small a second thread costs time, on a busy machine a lot of it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Utterance:
    """Conditions of a stream, and what it has to answer."""

    def __init__(self, frames, prompt, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.frames = frames
        self.prompt, self.mu, self.noise = (
            torch.randn(n, CHANNELS, generator=generator) for n in (prompt, frames, frames)
        )
        self.spks = torch.randn(CHANNELS, generator=generator)

    def open(self, streams, spare=0):
        noise = torch.cat([self.noise, torch.full((spare, CHANNELS), torch.nan)])
        max_frames = self.frames + spare
        return streams.open(max_frames, spks=self.spks, noise=noise, prompt=self.prompt)

    def solved(self, model, nfe, w, streaming=True, grid="cosine"):
        """By the sampler, all at once: the frames behind the prompt."""
        prompt = torch.zeros(1, self.frames, CHANNELS)
        prompt[0, : len(self.prompt)] = self.prompt
        cond = model.prepare(
            prompt,
            mu=self.mu[None],
            spks=self.spks[None],
            guided=w is not None,
            streaming=streaming,
        )
        mel = sampler.sample(model, self.noise[None], cond, grid, nfe=nfe, guidance=w)
        return mel[0, len(self.prompt) :]

    def pieces(self, draw):
        """The conditions in pieces of random sizes."""
        rest = self.mu
        while len(rest):
            n = draw.choice([1, 2, CHUNK, draw.randint(1, 4 * CHUNK)])
            yield rest[:n]
            rest = rest[n:]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("nfe", "w"), SOLVES)
@settings(max_examples=6, deadline=None)
@given(
    frames=st.integers(1, 43),
    share=st.floats(0, 1),
    spare=st.integers(0, 9),
    seed=st.integers(0, 1000),
)
def test_any_feeding_is_one_solve(family, nfe, w, frames, share, spare, seed):
    model, draw = MODELS[family][w], random.Random(seed)
    said = Utterance(frames, int(share * frames), seed)
    streams = Streams(model, "cosine", nfe, guidance=w, frames=frames + spare)
    with said.open(streams, spare) as stream:
        mels = []
        for piece in said.pieces(draw):
            stream.feed(piece)
            for _ in range(draw.randint(0, 2 * nfe)):
                streams.step()
            mels.append(stream.take())
        stream.finish()
        mels.append(stream.drain())
    got, want = torch.cat(mels), said.solved(model, nfe, w)
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    assert not len(want) or relative_rms(got, want) <= BOUND
    assert streams.frames_evaluated == nfe * frames * (1 if w is None else 2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("nfe", "w"), SOLVES)
@pytest.mark.parametrize("seed", range(2))
def test_streams_in_company(family, nfe, w, seed):
    """They join and leave between steps, each with a bound of its own, in memory used before."""
    model, draw = MODELS[family][w], random.Random(seed)
    streams = Streams(model, "cosine", nfe, guidance=w, frames=110, streams=3)
    waiting = [Utterance(draw.randint(1, 45), draw.randint(0, 1), seed=i) for i in range(8)]
    live, evaluated = [], 0
    while waiting or live:
        while waiting:
            try:
                stream = waiting[0].open(streams, spare=draw.randint(0, 8))
            except Full:
                break
            said = waiting.pop(0)
            live.append((said, stream, list(said.pieces(draw)), []))
        for _, stream, pieces, _ in live:
            if pieces and draw.random() < 0.7:
                stream.feed(pieces.pop(0))
                if not pieces:
                    stream.finish()
        announced = streams.step()
        for item in live[:]:
            said, stream, pieces, mels = item
            mels.append(stream.take())
            assert (len(mels[-1]) > 0) == (stream in announced)
            if pieces or stream.busy:
                continue
            stream.close()
            live.remove(item)
            evaluated += nfe * said.frames * streams.branches
            want = said.solved(model, nfe, w)
            assert not len(want) or relative_rms(torch.cat(mels), want) <= BOUND
    assert streams.frames_evaluated == evaluated


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("w", [None, 1.7])
@pytest.mark.parametrize("solved", [0, 10, 20])
def test_full_attention_at_the_end(family, w, solved):
    """What was emitted stays; the rest comes from a solve without the mask, here in company."""
    model, said, company = MODELS[family][w], Utterance(23, 7), Utterance(10, 0)
    streams = Streams(model, "cosine", 2, guidance=w, frames=33, streams=2)
    with said.open(streams) as stream, company.open(streams) as other:
        stream.feed(said.mu[:solved])
        mels = [stream.drain()]
        stream.feed(said.mu[solved:])
        stream.finish(full_attention=True)
        other.feed(company.mu)
        before = streams.frames_evaluated
        mels.append(stream.drain())
        assert streams.frames_evaluated - before == 2 * (23 + 10) * streams.branches
        assert relative_rms(other.take(), company.solved(model, 2, w)) <= BOUND
    emitted, got = max(solved - 7, 0), torch.cat(mels)
    blocks, whole = (said.solved(model, 2, w, streaming=masked) for masked in (True, False))
    assert len(mels[0]) == emitted
    assert not emitted or relative_rms(got[:emitted], blocks[:emitted]) <= BOUND
    assert relative_rms(got[emitted:], whole[emitted:]) <= BOUND
    assert emitted > 10 or relative_rms(blocks[emitted:], whole[emitted:]) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_full_attention_lets_blocks_under_way_end(family):
    model, said = MODELS[family][None], Utterance(23, 7)
    streams = Streams(model, "cosine", 2, frames=23)
    with said.open(streams) as stream:
        stream.feed(said.mu)
        assert streams.step() == []
        stream.finish(full_attention=True)
        got = stream.drain()
    blocks, whole = (said.solved(model, 2, None, streaming=masked) for masked in (True, False))
    assert relative_rms(got[:13], blocks[:13]) <= BOUND
    assert relative_rms(got[13:], whole[13:]) <= BOUND


@pytest.mark.parametrize("family", FAMILIES)
def test_full_attention_has_nothing_to_add_to_whole_blocks(family):
    model, said = MODELS[family][None], Utterance(10, 0)
    with said.open(Streams(model, nfe=1, frames=10)) as stream:
        stream.feed(said.mu)
        assert len(stream.drain()) == 10
        stream.finish(full_attention=True)
        assert not stream.busy
        assert len(stream.drain()) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_cost_is_linear_in_the_frames_added(family):
    streams = Streams(MODELS[family][1.7], nfe=3, guidance=1.7, frames=80)
    said = Utterance(80, 0)
    with said.open(streams) as stream:
        for n, block in enumerate(said.mu.split(2 * CHUNK), start=1):
            stream.feed(block)
            assert len(stream.drain()) == 2 * CHUNK
            assert streams.frames_evaluated == n * 2 * CHUNK * 3 * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_extended_by_the_models_alone(family):
    """Rows of any places and slots, each at its own step, against whole rows."""
    model, lengths = MODELS[family][1.7], [23, 9, 15]
    x, t = torch.randn(3, 23, CHANNELS), torch.tensor([0.1, 0.4, 0.9])
    batch = conditions(model, lengths)
    cond = model.prepare(**batch, guided=True, streaming=True)
    want = model(x, t, t, cond).chunk(2)
    cache = Cache(model.cache_sizes, 200, 9, model.dtype, torch.device("cpu"))
    cache.kv.fill_(torch.nan)
    tables = model.tables(t, t)
    given = [model.prepare(**one_row(batch, row), guided=True)["conditions"] for row in range(3)]
    rounds = (
        [(0, 0, 5), (1, 0, 5), (2, 0, 10)],  # row, first and last frame
        [(2, 10, 15), (0, 5, 20), (1, 5, 9)],
        [(0, 20, 23)],
    )
    for spans in rounds:
        both = [(branch, *span) for branch in range(2) for span in spans]
        extension = cache.extension(
            [last - first for _, _, first, last in both],
            [first for _, _, first, _ in both],
            [100 * branch + 31 * row for branch, row, _, _ in both],
            [2 * row + branch for branch, row, _, _ in both],
        )
        rows = [row for _, row, _, _ in both]
        v = model.extend(
            torch.cat([x[row, first:last] for row, first, last in spans]),
            torch.cat([given[row][:, first:last] for row, first, last in spans], dim=1),
            Modulation(tables.blocks[rows, 0].unbind(1), tables.final[rows, 0]),
            extension,
        )
        sizes = [last - first for _, _, first, last in both]
        for got, (branch, row, first, last) in zip(v.split(sizes), both, strict=True):
            assert relative_rms(got, want[branch][row, first:last]) <= BOUND


SWITCHES = [{"qk_norm": True, "rope_heads": 2}, {"long_skip": True}, {"rope_heads": 0}]


@pytest.mark.parametrize("switches", SWITCHES)
def test_a_dits_switches(switches):
    model, said = build("dit", **switches), Utterance(13, 3)
    streams = Streams(model, "cosine", 2, guidance=1.7, frames=13)
    with said.open(streams) as stream:
        for mu in said.mu.split(4):
            stream.feed(mu)
            streams.step()
        stream.finish()
        assert relative_rms(stream.drain(), said.solved(model, 2, 1.7)) <= BOUND


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("made", "opened", "used"), [(1, 1, 0), (0, 1, 0), (1, 0, 1), (0, 0, 1)])
def test_inference_mode_may_begin_and_end_anywhere(family, made, opened, used):
    model, said = MODELS[family][1.7], Utterance(12, 3)
    with torch.inference_mode(bool(made)):
        streams = Streams(model, "cosine", 2, guidance=1.7, frames=12)
    with torch.inference_mode(bool(opened)):
        stream = said.open(streams)
    with torch.inference_mode(bool(used)):
        stream.feed(said.mu[:7])
        streams.step()
    stream.feed(said.mu[7:])
    stream.finish()
    assert relative_rms(stream.drain(), said.solved(model, 2, 1.7)) <= BOUND


def test_autocast_does_not_reach_a_step():
    model, said = MODELS["dit"][None], Utterance(12, 3)
    streams = Streams(model, "cosine", 2, frames=12)
    with torch.autocast("cpu", torch.bfloat16), said.open(streams) as stream:
        stream.feed(said.mu)
        stream.finish()
        got = stream.drain()
    assert relative_rms(got, said.solved(model, 2, None)) <= BOUND


def test_half_precision_stays_near():
    model, said = build("unet").bfloat16(), Utterance(23, 4)
    with said.open(Streams(model, "cosine", 2, frames=23)) as stream:
        stream.feed(said.mu)
        stream.finish()
        got = stream.drain()
    assert got.dtype == torch.float32
    assert relative_rms(got, said.solved(model, 2, None)) <= 2e-2


def test_a_baked_student_streams():
    student, said = MODELS["dit"][None], Utterance(17, 3)
    streams = Streams(Baked.of(student, ["cosine"], 2), "cosine", 2, frames=17)
    with said.open(streams) as stream:
        stream.feed(said.mu)
        stream.finish()
        assert relative_rms(stream.drain(), said.solved(student, 2, None)) <= BOUND


def test_noise_from_a_generator_is_its_own():
    streams = Streams(MODELS["unet"][None], nfe=1, frames=20, streams=2)
    spks, mu = torch.randn(CHANNELS), torch.randn(10, CHANNELS)
    state = torch.get_rng_state()
    mels = []
    for noise in (torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)):
        with streams.open(10, spks=spks, noise=noise) as stream:
            stream.feed(mu)
            mels.append(stream.drain())
    assert torch.equal(*mels)
    assert torch.equal(state, torch.get_rng_state())


def test_a_stream_without_room_draws_no_noise():
    streams, noise = Streams(MODELS["unet"][None], nfe=1, frames=10), torch.Generator()
    with streams.open(10, spks=torch.zeros(CHANNELS), noise=torch.Generator()):
        before = noise.get_state()
        with pytest.raises(Full):
            streams.open(10, spks=torch.zeros(CHANNELS), noise=noise)
    assert torch.equal(noise.get_state(), before)


def test_what_is_given_may_change_afterwards():
    streams, said = Streams(MODELS["unet"][None], nfe=1, frames=10), Utterance(10, 3)
    want = said.solved(MODELS["unet"][None], 1, None)
    with said.open(streams) as stream:
        stream.feed(said.mu)
        for tensor in (said.mu, said.noise, said.prompt, said.spks):
            tensor.zero_()
        assert relative_rms(stream.drain(), want) <= BOUND


# -- memory ---------------------------------------------------------------------------------------


def test_memory_is_declared_and_given_back():
    model = MODELS["unet"][1.7]
    streams = Streams(model, nfe=3, guidance=1.7, frames=30, streams=3)
    first, second = (Utterance(10, 0).open(streams) for _ in "ab")
    # keys and values of 3 layers with 2 heads of 16, float32, in 3 steps and 2 branches
    assert first.nbytes >= 10 * 6 * 3 * 2 * 32 * 4
    assert first.nbytes == second.nbytes
    beside = first.nbytes - (streams.nbytes - streams._cache.nbytes_of_frame) // 3
    assert 0 < beside < 10 * (5 * CHANNELS * 4 + 3 * model.specs["conditions"].dims[2] * 4)
    with pytest.raises(ValueError, match=r"max_frames: expected at most the pool's \d+, got 1000"):
        streams.open(1000, spks=torch.zeros(CHANNELS), noise=torch.Generator())
    with pytest.raises(Full, match="max_frames: expected at most the 10 that are free"):
        Utterance(11, 0).open(streams)
    first.close()
    with pytest.raises(Full, match="max_frames"):  # two gaps of 10 that do not meet
        Utterance(11, 0).open(streams)
    third = Utterance(10, 0).open(streams)
    fourth = Utterance(7, 0).open(streams)
    with pytest.raises(Full, match="streams: expected room among 3"):
        Utterance(1, 0).open(streams)
    for stream in (second, third, fourth):
        stream.close()
        stream.close()
    Utterance(30, 0).open(streams).close()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("first", [13, 43])
def test_a_stream_never_holds_more_than_it_declares(family, full, first):
    """Beside its share of the pool; nothing is taken."""
    said = Utterance(43, 7)
    streams = Streams(MODELS[family][1.7], "cosine", 2, guidance=1.7, frames=43)
    with said.open(streams) as stream:
        cached = streams.nbytes - streams._cache.nbytes_of_frame
        stream.feed(said.mu[:first])
        for _ in range(12):
            if not stream.busy and stream.fed < 43:
                stream.feed(said.mu[first:])
            elif stream.fed == 43 and not stream._finished:
                stream.finish(full_attention=full)
            streams.step()
            held = [stream._noise, stream._mu, stream._prompt, stream._spks, *stream._done]
            work = stream._work
            if work is not None:
                held += [work.x, work.conditions, *(work.whole or {}).values()]
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in held}
            assert sum(s.nbytes() for s in storages.values()) <= stream.nbytes - cached
        assert not stream.busy
        assert len(stream.take()) == 36


def test_frames_not_taken_hold_their_own_memory():
    streams = Streams(MODELS["unet"][None], nfe=1, frames=40, streams=4)
    said = [Utterance(10, 0, seed) for seed in range(4)]
    live = [one.open(streams) for one in said]
    for one, stream in zip(said, live, strict=True):
        stream.feed(one.mu)
    streams.step()
    (waiting,) = live[0]._done
    assert waiting.untyped_storage().nbytes() == waiting.nbytes


def test_features_in_place_of_others_leave_a_stream_whole_when_refused():
    said = Utterance(12, 11)
    with said.open(Streams(MODELS["unet"][None], "cosine", 1, frames=12)) as stream:
        stream.feed(said.mu[:10])
        with pytest.raises(ValueError, match="mu: expected conditions of 11 to 12 frames, got 10"):
            stream.finish(full_attention=True, mu=torch.zeros(10, CHANNELS))
        assert stream.fed == 10
        stream.feed(said.mu[10:])
        stream.finish()
        assert len(stream.drain()) == 1


def test_a_failed_step_closes_what_it_stepped(monkeypatch):
    streams, said = Streams(build("unet"), nfe=2, frames=20, streams=2), Utterance(10, 0)
    stream, idle = said.open(streams), said.open(streams)
    stream.feed(said.mu)
    monkeypatch.setattr(streams.model, "extend", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        streams.step()
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="closed"):
        stream.take()
    idle.feed(said.mu)
    want = said.solved(streams.model, 2, None, grid="uniform")
    assert relative_rms(idle.drain(), want) <= BOUND


def test_one_call_runs_at_a_time():
    streams, said = Streams(MODELS["unet"][None], nfe=1, frames=10), Utterance(10, 0)
    with said.open(streams) as stream:
        calls = [streams.step, stream.take, lambda: stream.feed(said.mu), stream.finish]
        for call in [*calls, stream.close]:
            thread = threading.Thread(target=call)
            with streams._lock:
                thread.start()
                thread.join(0.05)
                assert thread.is_alive()
            thread.join()


def test_threads_may_feed_while_another_steps():
    model, said = MODELS["unet"][None], Utterance(40, 0)
    streams = Streams(model, "cosine", 2, frames=80, streams=2)

    def speak(stream):
        for piece in said.mu.split(3):
            stream.feed(piece)
        stream.finish()

    with said.open(streams) as one, said.open(streams) as two:
        threads = [threading.Thread(target=speak, args=(stream,)) for stream in (one, two)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            streams.step()
        want = said.solved(model, 2, None)
        for stream in (one, two):
            assert relative_rms(stream.drain(), want) <= BOUND


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "model: expected a CausalUNet"),
        ({"grid": [0.0, 0.5]}, ValueError, "grid: expected times from 0 to 1"),
        ({"guidance": torch.ones(1)}, TypeError, "guidance: expected a number"),
        ({"guidance": float("nan")}, ValueError, "guidance: expected a finite"),
        ({"frames": 0}, ValueError, "frames: expected an integer"),
        ({"streams": 0}, ValueError, "streams: expected an integer"),
    ],
)
def test_pools_name_what_is_wrong(change, error, message):
    given = {"model": MODELS["unet"][None], "grid": "uniform", "frames": 10} | change
    nfe = 2 if given["grid"] == "uniform" else None
    with pytest.raises(error, match=message):
        Streams(given.pop("model"), given.pop("grid"), nfe, **given)


def test_models_that_see_the_future_are_refused():
    with pytest.raises(ValueError, match="model: expected convolutions that look back only"):
        Streams(small_model("f5_v1"), nfe=1, frames=10)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"max_frames": 0}, ValueError, "max_frames: expected an integer"),
        ({"spks": torch.zeros(3)}, ValueError, "spks: expected shape"),
        ({"prompt": torch.zeros(11, CHANNELS)}, ValueError, "prompt: expected no more than"),
        ({"noise": torch.zeros(9, CHANNELS)}, ValueError, "noise: expected shape"),
        ({"noise": torch.zeros(10, CHANNELS).half()}, TypeError, "noise: expected torch.float32"),
        ({"noise": None}, TypeError, "noise: expected a tensor"),
    ],
)
def test_open_names_what_is_wrong(change, error, message):
    streams = Streams(MODELS["unet"][None], nfe=1, frames=20)
    given = {"max_frames": 10, "spks": torch.zeros(CHANNELS), "noise": torch.Generator()} | change
    with pytest.raises(error, match=message):
        streams.open(given.pop("max_frames"), **given)


def test_streams_name_what_is_wrong():
    said = Utterance(10, 4)
    stream = said.open(Streams(MODELS["unet"][None], nfe=1, frames=10))
    with pytest.raises(ValueError, match="mu: expected shape"):
        stream.feed(torch.zeros(1, 5, CHANNELS))
    with pytest.raises(TypeError, match=r"mu: expected torch\.float32"):
        stream.feed(torch.zeros(5, CHANNELS).int())
    stream.feed(said.mu[:3])
    with pytest.raises(ValueError, match="mu: expected conditions of the prompt's 4 frames, got 3"):
        stream.finish()
    with pytest.raises(ValueError, match="mu: expected at most 7 more frames"):
        stream.feed(torch.zeros(8, CHANNELS))
    stream.feed(said.mu[3:])
    stream.finish()
    for again in (lambda: stream.feed(said.mu[:0]), stream.finish):
        with pytest.raises(RuntimeError, match="got one that is finished"):
            again()
    assert len(stream.drain()) == 6
    stream.close()
    for call in (lambda: stream.feed(said.mu[:0]), stream.finish, stream.take, stream.drain):
        with pytest.raises(RuntimeError, match="got one that is closed"):
            call()
