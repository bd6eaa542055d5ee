"""What a model is given: spans and prompts as in the clients' training, and nothing dropped."""

import pytest
import torch

from imf_kernels import Batch
from imf_kernels.data import Continuation, Encoded, Infilling, Utterance
from imf_kernels.models.token_encoder import ConformerEncoder


def utterance(index, tokens, channels=4):
    generator = torch.Generator().manual_seed(index)
    return Utterance(
        f"row {index}",
        torch.randn(2 * tokens, channels, generator=generator),
        {
            "text": torch.randint(9, (tokens // 3,), generator=generator),
            "tokens": torch.randint(1, 30, (tokens,), generator=generator),
            "speaker": torch.randn(6, generator=generator),
        },
    )


ROWS = [utterance(i, tokens) for i, tokens in enumerate((30, 50, 20))]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batches(collate, number=300):
    source = generator()
    return [collate(ROWS, source) for _ in range(number)]


@pytest.mark.parametrize("collate", [Infilling(), Continuation()])
def test_all_of_a_row_and_nothing_else(collate):
    state = torch.get_rng_state()
    batch = collate(ROWS, generator())
    assert torch.equal(torch.get_rng_state(), state), "draws from the generator only"
    assert batch.names == ("row 0", "row 1", "row 2")
    assert batch.lengths.tolist() == [60, 100, 40]
    for row, one in enumerate(ROWS):
        assert torch.equal(batch.x1[row, : len(one.mel)], one.mel)
        assert not batch.x1[row, len(one.mel) :].any()
    again = collate(ROWS, generator())
    assert torch.equal(again.loss_mask, batch.loss_mask)
    assert not torch.equal(collate(ROWS, generator(1)).loss_mask, batch.loss_mask)


def test_infilling():
    shares = []
    for batch in batches(Infilling()):
        span, valid = batch.loss_mask, batch.valid()
        assert torch.equal(batch.conditions["prompt"], batch.x1.masked_fill(span[..., None], 0.0))
        assert not (span & ~valid).any()
        edges = torch.nn.functional.pad(span.int(), (1, 1)).diff(dim=1).abs().sum(1)
        assert edges.tolist() == [2, 2, 2], "one span each"
        shares.append(span.sum(1) / batch.lengths)
    shares = torch.cat(shares)
    assert bool(((shares > 0.7 - 1 / 40) & (shares <= 1)).all())
    assert float(shares.mean()) == pytest.approx(0.84, abs=0.02)
    text = batch.conditions["text"]
    for row, one in enumerate(ROWS):
        own = one.features["text"]
        assert text[row].tolist() == own.tolist() + [-1] * (16 - len(own))


def test_dropped_prompts():
    found = batches(Infilling(drop_prompt=0.25))
    silent = torch.cat([(batch.conditions["prompt"] == 0).all(2).all(1) for batch in found])
    assert float(silent.float().mean()) == pytest.approx(0.25, abs=0.06)
    assert all(batch.loss_mask.any(1).all() for batch in found)


def test_continuation():
    found, most = batches(Continuation()), torch.tensor([18, 30, 12])
    heard = []
    for batch in found:
        prompt = (batch.conditions["prompt"] != 0).any(2)
        heard.append(prompt.sum(1))
        assert torch.equal(batch.loss_mask, batch.valid() & ~prompt)
        rows = torch.arange(100) < heard[-1][:, None]
        assert torch.equal(prompt, rows), "a prefix"
        assert torch.equal(batch.conditions["prompt"][rows], batch.x1[rows])
        assert batch.conditions["token_lengths"].tolist() == [30, 50, 20]
        assert type(batch.conditions["streaming"]) is bool
    heard = torch.stack(heard)
    assert heard.max(0).values.tolist() == most.tolist()
    assert float((heard / most).mean()) == pytest.approx(0.25, abs=0.03)
    prompted = (heard > 0).float().mean(0)
    assert prompted.tolist() == pytest.approx((0.5 * most / (most + 1)).tolist(), abs=0.09)
    coins = [batch.conditions["streaming"] for batch in found]
    assert sum(coins) / len(coins) == pytest.approx(0.5, abs=0.09)


def small_encoder():
    sizes = {"vocab": 30, "dim": 8, "channels": 4, "speaker": 6, "heads": 2, "inner": 16}
    encoder = ConformerEncoder(**sizes, blocks=1, up_blocks=1, lookahead=3, chunk=4)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder.eval()


@pytest.mark.parametrize("streaming", [0.0, 1.0])
def test_encoded(streaming):
    """A batch equals its rows, and its coin is the encoder's as well."""
    encoder = small_encoder()
    batch = Continuation(streaming=streaming)(ROWS, generator())
    got = Encoded(encoder)(batch)
    assert isinstance(got, Batch)
    assert got.conditions.keys() == {"prompt", "mu", "spks", "streaming"}
    assert got.names == batch.names
    for row, one in enumerate(ROWS):
        mu, _ = encoder(one.features["tokens"][None], streaming=bool(streaming))
        frames = len(one.mel)
        torch.testing.assert_close(got.conditions["mu"][row, :frames], mu[0], rtol=0, atol=2e-5)
        spks = encoder.speakers(one.features["speaker"][None])[0]
        torch.testing.assert_close(got.conditions["spks"][row], spks)
    assert not got.conditions["mu"].requires_grad
    other, _ = encoder(batch.conditions["tokens"], batch.lengths // 2, streaming=not streaming)
    assert not torch.allclose(got.conditions["mu"], other, atol=1e-3), "the coin matters"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Infilling(shares=(0.9, 0.5)), "shares: expected ascending shares"),
        (lambda: Infilling(drop_prompt=1.5), r"drop_prompt: expected a finite number in \[0, 1\]"),
        (lambda: Continuation(prompted=-1), "prompted: expected a finite number"),
        (
            lambda: Infilling()([Utterance("x", torch.ones(3, 2))], generator()),
            r"x: expected a feature 'text', got \[\]",
        ),
        (
            lambda: Infilling()([Utterance("x", torch.ones(3, 2), {"text": X})], generator()),
            r"text of x: expected shape \(L,\), got \(1, 2\)",
        ),
        (lambda: Utterance("x", torch.ones(3)), r"mel of x: expected shape \(n, C\)"),
        (lambda: Utterance("x", torch.ones(0, 2)), "mel of x: expected one frame or more"),
        (
            lambda: Batch(torch.ones(2, 3, 1), torch.tensor([3, 3]), names=("a",)),
            "names: expected one for each of 2 rows",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


X = torch.zeros(1, 2, dtype=torch.int64)
