"""text2mel on made utterances: its data, its recogniser, training that resumes, the whole run."""

import json
import sys

import pytest
import torch

pytest.importorskip("espeakng_loader", reason="needs the [demo] extra")
pytest.importorskip("librosa", reason="needs the [demo] extra")

from examples.quickstart import metrics
from examples.quickstart.corpus import Corpus, Utterance
from examples.quickstart.model import load_teacher as load_aligned
from examples.text2mel import __main__ as text2mel
from examples.text2mel import experiment, model, train_teacher
from examples.text2mel import recogniser as recogniser_module
from examples.text2mel.data import (
    SPAN,
    TrainingBatches,
    continuation,
    generator_of,
    random_spans,
    spread_text,
)
from examples.text2mel.recogniser import (
    accuracy,
    best_path,
    edit_distance,
    spoken,
    train_recogniser,
)
from examples.text2mel.summary import table
from imf_kernels.models import DiT, DiTConfig, TextConfig

CPU = torch.device("cpu")
SYMBOLS = ("_", *"abcdefg")


def made(count, seed):
    """Utterances of phonemes that each have a mel of their own."""
    generator = torch.Generator().manual_seed(seed)
    sounds = torch.randn(len(SYMBOLS), 80, generator=torch.Generator().manual_seed(0))
    utterances = []
    for number in range(count):
        ids = torch.randint(len(SYMBOLS), (9,), generator=generator)
        phonemes = ids.repeat_interleave(torch.randint(2, 5, (9,), generator=generator))
        mel = sounds[phonemes] + 0.3 * torch.randn(len(phonemes), 80, generator=generator)
        utterances.append(Utterance(f"{seed} {number}", 0, phonemes, mel))
    return utterances


def tiny():
    text = TextConfig(vocab=len(SYMBOLS), dim=16, layers=1)
    torch.manual_seed(0)
    return DiT(
        DiTConfig.for_variant(
            "f5_v1", text=text, dim=32, depth=1, heads=1, head_dim=16, channels=80
        )
    )


@pytest.fixture(scope="module")
def utterances():
    return made(40, 1)


@pytest.fixture(autouse=True)
def narrow_recogniser(monkeypatch):
    monkeypatch.setattr(recogniser_module, "WIDTH", 32)
    monkeypatch.setattr(recogniser_module, "LEARNING_RATE", 1e-2)


def test_text_is_spread_evenly():
    phonemes = torch.tensor([3] * 7 + [1] * 1 + [2] * 2 + [3] * 2)
    assert spread_text(phonemes).tolist() == [3] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert torch.equal(spread_text(phonemes, evenness=0.0), phonemes)
    between = spread_text(phonemes, evenness=0.5)
    assert torch.unique_consecutive(between).tolist() == [3, 1, 2, 3]
    assert between.tolist() not in (phonemes.tolist(), spread_text(phonemes).tolist())


def test_durations_stay_out_of_the_text(utterances):
    """Only the number of frames and the sequence are in it."""
    for u in utterances:
        backwards = torch.unique_consecutive(u.phonemes, return_counts=True)
        other = backwards[0].repeat_interleave(backwards[1].flip(0))
        assert torch.equal(spread_text(u.phonemes), spread_text(other))


def test_batches_are_infilling(utterances):
    batches = TrainingBatches(utterances, 8, seed=3)
    seen = []
    for k in range(5):
        batch = batches(k)
        prompt, text = batch.conditions["prompt"], batch.conditions["text"]
        span = batch.loss_mask
        assert torch.equal(text >= 0, batch.valid())
        assert not (span & ~batch.valid()).any()
        assert torch.equal(prompt[~span], batch.x1[~span])
        assert (prompt[span] == 0).all()
        share = span.sum(1) / batch.lengths
        assert float(share.min()) > SPAN[0] - 0.04
        assert (span.int().diff(dim=1).abs().sum(1) <= 2).all()  # one piece
        seen += [row[:n].sum().item() for row, n in zip(batch.x1, batch.lengths, strict=True)]
    assert len({round(x, 3) for x in seen}) == len(utterances)
    again = TrainingBatches(utterances, 8, seed=3)(3)
    assert torch.equal(again.x1, batches(3).x1)
    assert torch.equal(again.loss_mask, batches(3).loss_mask)
    assert not torch.equal(batches(8).x1[:, :9], batches(3).x1[:, :9])


def test_spans_reach_all_frames(utterances):
    spans = torch.stack([random_spans(utterances, generator_of(k)) for k in range(200)])
    lengths = torch.tensor([len(u.mel) for u in utterances])
    assert int(spans[..., 0].min()) == 0
    assert (spans[..., 1] <= lengths).all()
    assert (spans[..., 1] == lengths).any()


def test_edit_distance():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance("abc", "abc") == 0


def test_decoding_pays_for_changes():
    scores = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.9, 0.1], [1e-3, 0.999], [1e-3, 0.999]]).log()
    assert best_path(scores).tolist() == [0, 0, 0, 1, 1]


def test_recogniser_hears_what_is_there(utterances):
    recogniser = train_recogniser(utterances, len(SYMBOLS), seed=0, updates=60)
    new = made(10, 2)
    mels, said, prompts = [u.mel for u in new], [u.phonemes for u in new], [5] * len(new)
    assert accuracy(recogniser, mels, said, prompts) > 0.9
    assert accuracy(recogniser, mels, said[1:] + said[:1], prompts) < 0.6
    slower = [mel.repeat_interleave(2, dim=0) for mel in mels]
    assert accuracy(recogniser, slower, said, [0] * len(new)) > 0.75
    silence = [u.mel.new_zeros(u.mel.shape) + mels[0].mean() for u in new]
    assert accuracy(recogniser, silence, said, prompts) < 0.4
    assert spoken(torch.tensor([0, 0, 4, 4, 0, 4, 1, 0])) == [4, 4, 1]


def test_training_goes_on_to_the_bit(utterances, tmp_path):
    def new_run():
        return train_teacher.Run(tiny(), utterances, updates=6, peak=1e-2, seed=5)

    undisturbed = new_run()
    for _ in range(6):
        undisturbed.step()
    broken_off = new_run()
    for _ in range(3):
        broken_off.step()
    broken_off.save(tmp_path / "checkpoint.pt")
    resumed = new_run()
    resumed.load(tmp_path / "checkpoint.pt")
    for _ in range(3):
        resumed.step()
    for name, value in undisturbed.averaged.state_dict().items():
        assert torch.equal(value, resumed.averaged.state_dict()[name])


def test_training_learns(utterances):
    run = train_teacher.Run(tiny(), utterances, updates=40, peak=2e-2, seed=5)
    losses = [run.step() for _ in range(40)]
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


def test_training_starts_from_the_quickstart():
    aligned = load_aligned()
    own = model.untrained(aligned)
    weights = own.state_dict()
    assert sum(w.numel() for w in weights.values()) <= 3_000_000
    assert torch.equal(
        weights["transformer_blocks.3.ff.ff.2.weight"],
        aligned.estimator.state_dict()["transformer_blocks.4.ff.ff.2.weight"],
    )
    (u,) = made(1, 3)
    batch = continuation([u], torch.tensor([4]), CPU)
    cond = own.prepare(lengths=batch.lengths, **batch.conditions)
    v = own(torch.randn_like(batch.x1), torch.zeros(1), torch.zeros(1), cond)
    assert v.abs().mean() > 0.1


def test_saved_teacher_is_the_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "teacher_config", lambda symbols: tiny().config)
    teacher = tiny().half().float()
    model.save_teacher(teacher, SYMBOLS, tmp_path / "teacher.safetensors")
    again, symbols = model.load_teacher(tmp_path / "teacher.safetensors")
    assert symbols == SYMBOLS
    assert not again.training
    for name, value in again.state_dict().items():
        assert torch.equal(value, teacher.state_dict()[name])


@pytest.mark.skipif(not model.TEACHER.exists(), reason="no teacher is shipped")
def test_shipped_teacher():
    assert model.TEACHER.stat().st_size <= 6_000_000
    teacher, symbols = model.load_teacher()
    assert symbols == load_aligned().symbols
    assert teacher.config == model.teacher_config(symbols)


def test_the_whole_run(utterances, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "teacher_config", lambda symbols: tiny().config)
    monkeypatch.setattr(experiment, "FINE", 3)
    monkeypatch.setattr(experiment, "FEW", (2, 1))
    monkeypatch.setattr(metrics, "c2st", lambda generated, truth, seed: 0.5)  # the slow one
    monkeypatch.setattr(text2mel, "train_recogniser", lambda u, n, s: train_recogniser(u, n, s, 20))
    corpus = Corpus(utterances, made(2, 2), made(3, 3), SYMBOLS, ("one",))
    monkeypatch.setattr(text2mel, "build_corpus", lambda seed, symbols: corpus)
    run = train_teacher.Run(tiny(), utterances, updates=4, peak=1e-2, seed=5)
    run.step()
    teacher, out = tmp_path / "teacher.safetensors", tmp_path / "out"
    model.save_teacher(run.averaged, SYMBOLS, teacher)
    arguments = ["--updates", "2", "--teacher", str(teacher), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["text2mel", *arguments])
    text2mel.main()
    results = json.loads((out / "results.json").read_text())
    rows = {(row["model"], row["nfe"], row["grid"]): row for row in results["rows"]}
    for name in ("teacher", "student, all", "student, span"):
        assert {(name, 2, k) for k in ("uniform", "sway", "o3s", "o3s phonemes")} <= set(rows)
        assert (name, 1, "uniform") in rows
    assert len(rows) == 1 + 3 * 5
    assert all(row["times"][0] == 0 and row["times"][-1] == 1 for row in rows.values())
    assert results["gate"]["holds"] == (results["gate"]["value"] >= 0.8)
    for search in results["o3s"].values():
        assert search["evaluations"] >= 1
    assert table([results]).count("\n") == len(rows) + 1
