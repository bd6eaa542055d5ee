"""Tokens to `mu` and `spks`: upstream's numbers, rows alone, and any way of feeding a stream."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imf_kernels.models import TokenEncoder, load_token_encoder
from imf_kernels.models.conformer import Span, sinusoids
from imf_kernels.models.token_encoder import ConformerEncoder, LookaheadEncoder
from tests.models.tools import golden, recipe, relative_rms

FAMILIES = ("cosy2_encoder", "cosy3_lookahead")
CHUNK, LOOKAHEAD = 4, 3


def made(family: str, seed: int = 0) -> TokenEncoder:
    """A tiny encoder whose blocks are short."""
    sizes = {"vocab": 20, "channels": 6, "speaker": 5, "inner": 16}
    switches = {"lookahead": LOOKAHEAD, "chunk": CHUNK}
    if family == "cosy2_encoder":
        encoder = ConformerEncoder(**sizes, **switches, dim=8, heads=2, blocks=2, up_blocks=1)
    else:
        encoder = LookaheadEncoder(**sizes, **switches)
    shapes = {name: list(value.shape) for name, value in encoder.state_dict().items()}
    encoder.load_state_dict(recipe(shapes, seed))
    return encoder.eval().requires_grad_(False)


@pytest.fixture(params=FAMILIES)
def encoder(request):
    return made(request.param)


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(20, shape, generator=torch.Generator().manual_seed(seed))


# -- upstream's numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("final", [True, False])
def test_golden_mu(family, streaming, final):
    tensors, _, state = golden(family)
    name = "mu" + "_stream" * (streaming and family == "cosy2_encoder") + "_context" * (not final)
    encoder = TokenEncoder.from_state_dict(state)
    mu, lengths = encoder(tensors["tokens"], streaming=streaming, final=final)
    assert lengths.tolist() == [tensors[name].shape[1]]
    torch.testing.assert_close(mu, tensors[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_speakers(family):
    tensors, _, state = golden(family)
    encoder = TokenEncoder.from_state_dict(state)
    spks = encoder.speakers(tensors["embedding"])
    torch.testing.assert_close(spks, tensors["spks"], rtol=0, atol=1e-6)
    torch.testing.assert_close(encoder.speakers(3 * tensors["embedding"]), spks)


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_stream(family):
    tensors, _, state = golden(family)
    tokens = tensors["tokens"][0]
    expected = tensors.get("mu_stream", tensors["mu"])[0]
    stream = TokenEncoder.from_state_dict(state).open(len(tokens))
    mu = torch.cat([*map(stream.feed, tokens.split(9)), stream.finish()])
    torch.testing.assert_close(mu, expected, rtol=0, atol=2e-5)


def test_the_distances_are_those_of_query_and_key():
    """Against scores written as a double loop."""
    attention = made("cosy2_encoder").encoder.encoders[0].self_attn
    x, lengths = torch.randn(1, 7, 8), torch.tensor([7])
    span = Span.whole(lengths, 7, None)
    got = attention(x, sinusoids(span.distances, 8)[None], span, None)
    q, k, v = (
        layer(x)[0].view(7, 2, 4)
        for layer in (attention.linear_q, attention.linear_k, attention.linear_v)
    )
    scores = torch.empty(2, 7, 7)
    for i in range(7):
        for j in range(7):
            p = attention.linear_pos(sinusoids(torch.tensor([float(i - j)]), 8)).view(2, 4)
            content = (q[i] + attention.pos_bias_u) * k[j]
            scores[:, i, j] = (content + (q[i] + attention.pos_bias_v) * p).sum(1) / 2
    y = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(1, 7, 8)
    torch.testing.assert_close(got, attention.linear_out(y))


# -- whole rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("final", [True, False])
def test_a_batch_equals_its_rows_alone(encoder, streaming, final):
    lengths, tokens = torch.tensor([4, 17, 9]), ids(3, 17)
    mu, frames = encoder(tokens, lengths, streaming=streaming, final=final)
    assert frames.tolist() == [2 * (n - (0 if final else LOOKAHEAD)) for n in lengths.tolist()]
    for row, (n, m) in enumerate(zip(lengths.tolist(), frames.tolist(), strict=True)):
        alone, _ = encoder(tokens[row : row + 1, :n], streaming=streaming, final=final)
        assert relative_rms(mu[row, :m], alone[0]) <= 1e-6
        assert not mu[row, m:].any()


def test_whole_blocks_are_final_once_the_lookahead_is_known(encoder):
    tokens = ids(1, 19)
    whole, _ = encoder(tokens, streaming=True)
    for blocks in range(1, 5):
        known = tokens[:, : blocks * CHUNK + LOOKAHEAD]
        mu, _ = encoder(known, streaming=True, final=False)
        assert mu.shape[1] == 2 * blocks * CHUNK
        assert relative_rms(mu, whole[:, : mu.shape[1]]) <= 1e-6
        changed = known.clone()
        changed[0, -1] = (changed[0, -1] + 1) % 20
        other, _ = encoder(changed, streaming=True, final=False)
        assert relative_rms(other, whole[:, : mu.shape[1]]) > 1e-4, "the last token matters"


def test_within_a_block_nothing_is_final():
    encoder, tokens = made("cosy2_encoder"), ids(1, 19)
    whole, _ = encoder(tokens, streaming=True)
    mu, _ = encoder(tokens[:, : CHUNK + 2 + LOOKAHEAD], streaming=True, final=False)
    assert relative_rms(mu[:, 2 * CHUNK :], whole[:, 2 * CHUNK : mu.shape[1]]) > 1e-4


def test_without_streaming_a_token_sees_all():
    encoder, tokens = made("cosy2_encoder"), ids(1, 19)
    assert relative_rms(encoder(tokens)[0], encoder(tokens, streaming=True)[0]) > 1e-4


def test_negative_ids_are_0(encoder):
    tokens = ids(1, 9)
    tokens[0, 3] = 0
    expected, _ = encoder(tokens)
    tokens[0, 3] = -1
    assert torch.equal(encoder(tokens)[0], expected)


def test_half_precision(encoder):
    expected, _ = encoder(ids(1, 19))
    encoder.bfloat16()
    mu, _ = encoder(ids(1, 19))
    assert mu.dtype == torch.bfloat16
    assert relative_rms(mu.float(), expected) < 0.05
    stream = encoder.open(19)
    assert stream.feed(ids(19)).dtype == torch.bfloat16


def test_frozen(encoder):
    assert not encoder.training
    assert not encoder(ids(1, 5))[0].requires_grad
    assert not encoder.speakers(torch.randn(1, 5, requires_grad=True)).requires_grad


# -- streams -----------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    sizes=st.lists(st.integers(0, 11), max_size=7),
    spare=st.integers(1, 5),
)
def test_any_way_of_feeding_is_the_whole_streaming_answer(family, sizes, spare):
    encoder, total = made(family), sum(sizes)
    tokens = ids(total, seed=total)
    stream = encoder.open(total + spare)
    mu = torch.cat([*map(stream.feed, tokens.split(sizes)), stream.finish()])
    assert mu.shape == (2 * total, 6)
    if total:
        assert relative_rms(mu, encoder(tokens[None], streaming=True)[0][0]) <= 1e-5
    at_once = encoder.open(total + spare)
    assert torch.equal(mu, torch.cat([at_once.feed(tokens), at_once.finish()]))


def test_a_block_comes_with_its_lookahead(encoder):
    stream, tokens = encoder.open(30), ids(30)
    counts = [len(stream.feed(token)) for token in tokens.split(1)]
    due = [n for n, count in enumerate(counts, 1) if count]
    assert due == [7, 11, 15, 19, 23, 27]
    assert {count for count in counts if count} == {2 * CHUNK}
    assert len(stream.finish()) == 2 * (30 - 24)


def test_full_attention_at_the_end(encoder):
    stream, tokens = encoder.open(19), ids(19)
    stream.feed(tokens[:11])
    stream.feed(tokens[11:])
    assert torch.equal(stream.finish(full_attention=True), encoder(tokens[None])[0][0])
    assert encoder.open(3).finish(full_attention=True).shape == (0, 6)


def test_a_token_passes_each_layer_once():
    """What is encoded does not depend on how much was before, nor on how it comes."""
    encoder, passed = made("cosy2_encoder"), {}
    for name, module in encoder.named_modules():
        if name.endswith(("w_1", "linear_k", "linear_pos")):
            passed[name] = 0

            def count(module, inputs, output, name=name):
                passed[name] += output.shape[1]

            module.register_forward_hook(count)
    stream = encoder.open(40)
    for part in ids(40).split(3):
        stream.feed(part)
    stream.finish()
    for name, count in passed.items():
        rate = 2 if "up_encoders" in name else 1
        to_the_right = rate * CHUNK - 1 if name.endswith("linear_pos") else 0
        assert count == rate * 40 + to_the_right, name


def test_bytes_are_declared_and_do_not_grow(encoder):
    stream = encoder.open(40)

    def held() -> int:
        kept = [kept.values for layer in stream._past.values() for kept in layer]
        return sum(tensor.untyped_storage().nbytes() for tensor in [stream._tokens, *kept])

    before = held()
    for part in ids(40).split(9):
        stream.feed(part)
    assert held() == before == stream.nbytes
    smaller, larger = encoder.open(400).nbytes, encoder.open(800).nbytes
    assert larger < 2 * smaller + 1
    assert (larger - smaller) * 2 == encoder.open(1200).nbytes - smaller


def test_the_bound(encoder):
    stream, tokens = encoder.open(10), ids(10)
    first = stream.feed(tokens[:8])
    with pytest.raises(ValueError, match=r"tokens: expected at most 2 more .* = 10, got 3"):
        stream.feed(ids(3))
    mu = torch.cat([first, stream.feed(tokens[8:]), stream.finish()])
    assert relative_rms(mu, encoder(tokens[None], streaming=True)[0][0]) <= 1e-5


def test_inference_mode_may_begin_and_end_between_calls(encoder):
    tokens = ids(20)
    with torch.inference_mode():
        stream = encoder.open(20)
    mu = [stream.feed(tokens[:9])]
    with torch.inference_mode():
        mu.append(stream.feed(tokens[9:15]))
    mu += [stream.feed(tokens[15:]), stream.finish()]
    assert relative_rms(torch.cat(mu), encoder(tokens[None], streaming=True)[0][0]) <= 1e-5


def test_a_closed_stream_takes_nothing(encoder):
    finished, closed = encoder.open(10), encoder.open(10)
    finished.finish()
    closed.feed(ids(4))
    closed.close()
    closed.close()
    for stream in (finished, closed):
        for call in (lambda s=stream: s.feed(ids(1)), stream.finish):
            with pytest.raises(RuntimeError, match="closed"):
                call()


# -- doors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e(ids(5)), r"tokens: expected shape \(B, L\), got \(5,\)"),
        (lambda e: e(ids(1, 5).float()), "tokens: expected torch.int64 or torch.int32"),
        (lambda e: e(ids(1, 5) + 20), "tokens: expected ids below 20, got"),
        (lambda e: e(ids(2, 5), torch.tensor([5])), "lengths: expected shape"),
        (lambda e: e(ids(1, 5), torch.tensor([6])), r"lengths: expected values in \[1, 5\]"),
        (lambda e: e(ids(1, 3), final=False), "tokens: expected more than 3 a row, got 3"),
        (
            lambda e: e(ids(2, 5), torch.tensor([5, 3]), final=False),
            r"lengths: expected more than 3 tokens, got \[5, 3\]",
        ),
        (lambda e: e.speakers(torch.ones(1, 4)), r"embedding: expected shape \(B, 5\)"),
        (lambda e: e.speakers(torch.ones(1, 5).long()), "embedding: expected torch.float32"),
        (lambda e: e.open(0), "max_tokens: expected an integer >= 1, got 0"),
        (lambda e: e.open(9).feed(ids(1, 9)), r"tokens: expected shape \(n,\)"),
        (lambda e: e.open(9).feed(torch.ones(2)), "tokens: expected torch.int64 or torch.int32"),
        (lambda e: e.open(9).feed(torch.tensor([20])), "tokens: expected ids below 20, got 20"),
    ],
)
def test_errors(encoder, call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(encoder)


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dicts(family):
    tensors, _, state = golden(family)
    expected, _ = TokenEncoder.from_state_dict(state)(tensors["tokens"])
    whole = {f"flow.{name}": value for name, value in state.items()}
    whole |= {"flow.decoder.estimator.x": torch.ones(1), "mel2wav.weight": torch.ones(1)}
    encoder = TokenEncoder.from_state_dict(whole, chunk=7)
    assert encoder.chunk == 7
    assert torch.equal(encoder(tensors["tokens"])[0], expected)
    for name in ("input_embedding.weight", "spk_embed_affine_layer.weight"):
        with pytest.raises(ValueError, match=f"expected the key '{name}'"):
            TokenEncoder.from_state_dict({k: v for k, v in state.items() if k != name})
    with pytest.raises(ValueError, match=r"unexpected.*another"):
        TokenEncoder.from_state_dict(state | {"another": torch.ones(1)})
    last = list(state)[-1]
    with pytest.raises(ValueError, match=f"missing.*{last}"):
        TokenEncoder.from_state_dict({k: v for k, v in state.items() if k != last})
    with pytest.raises(ValueError, match=rf"{last}: expected shape .* got \(3,\)"):
        TokenEncoder.from_state_dict(state | {last: torch.ones(3)})
    with pytest.raises(ValueError, match="chunk: expected an integer >= 1, got 0"):
        TokenEncoder.from_state_dict(state, chunk=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flows_file(family, tmp_path):
    tensors, _, state = golden(family)
    path = tmp_path / "flow.pt"
    torch.save(state | {"decoder.estimator.x": torch.ones(1), "epoch": 3, "step": 4000}, path)
    expected = TokenEncoder.from_state_dict(state)(tensors["tokens"])[0]
    assert torch.equal(load_token_encoder(path)(tensors["tokens"])[0], expected)
    torch.save({"decoder.estimator.x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"flow.pt: .*expected the key 'input_embedding.weight'"):
        load_token_encoder(path)


PUBLIC = {
    "cosy2_encoder": (
        {"dim": 512, "heads": 8, "inner": 2048, "blocks": 6, "up_blocks": 4},
        41_246_880,
    ),
    "cosy3_lookahead": ({"inner": 1024}, 1_114_864),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_public_sizes_on_no_device_at_all(family):
    """Sizes are read from shapes, and no call reads a value: the meta device has none."""
    sizes, parameters = PUBLIC[family]
    made_by = ConformerEncoder if family == "cosy2_encoder" else LookaheadEncoder
    with torch.device("meta"):
        encoder = made_by(vocab=6561, channels=80, speaker=192, lookahead=3, **sizes)
        shapes = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
        assert sizes.items() <= made_by.sizes(shapes).items()
        assert sum(parameter.numel() for parameter in encoder.parameters()) == parameters
        tokens = torch.zeros(2, 60, dtype=torch.int64)
        mu, lengths = encoder(tokens, torch.full((2,), 60), streaming=True, final=False)
        assert (mu.shape, lengths.shape) == ((2, 114, 80), (2,))
        stream = encoder.open(60)
        assert stream.feed(tokens[0]).shape == (100, 80)
        assert stream.finish().shape == (20, 80)
