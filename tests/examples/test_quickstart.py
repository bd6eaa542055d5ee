"""The quickstart on a few utterances: its material, its metrics, and the run from end to end."""

import copy
import json
import re
import sys

import pytest
import torch

pytest.importorskip("espeakng_loader", reason="needs the [demo] extra")
pytest.importorskip("librosa", reason="needs the [demo] extra")

import imf_kernels.metrics
from examples.quickstart import __main__ as quickstart
from examples.quickstart import corpus as corpus_module
from examples.quickstart import experiment, metrics
from examples.quickstart.audio import MELS, griffin_lim, log_mel, natural_log_mel, write_wav
from examples.quickstart.corpus import build_corpus
from examples.quickstart.data import MAX_PROMPT, random_prompts, training_batches
from examples.quickstart.model import TEACHER, load_teacher, save_teacher
from examples.quickstart.split import Split
from imf_kernels import grids

FEW = {"train": 40, "dev": 4, "test": 6}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus():
    full, corpus_module.SENTENCES = corpus_module.SENTENCES, FEW
    try:
        yield build_corpus(0, load_teacher().symbols)
    finally:
        corpus_module.SENTENCES = full


@pytest.fixture(scope="module")
def teacher():
    return load_teacher()


def test_splits_share_no_sentence(corpus):
    texts = [{u.text for u in split} for split in (corpus.train, corpus.dev, corpus.test)]
    assert [len(split) for split in texts] == list(FEW.values())
    assert len(set.union(*texts)) == sum(FEW.values())


def test_texts_follow_the_seed(corpus, monkeypatch):
    monkeypatch.setattr(corpus_module, "SENTENCES", FEW)
    again = build_corpus(0, corpus.symbols)
    other = build_corpus(1, corpus.symbols)
    assert [u.text for u in again.test] == [u.text for u in corpus.test]
    assert {u.text for u in other.test}.isdisjoint(u.text for u in corpus.test)


def test_utterances_are_what_they_say(corpus):
    for u in corpus.train:
        assert u.mel.shape[1] == MELS
        assert u.phonemes.shape == (len(u.mel),)
        assert 0 <= int(u.phonemes.min()) <= int(u.phonemes.max()) < len(corpus.symbols)
        assert 50 <= len(u.mel) <= 250
    mels = torch.cat([u.mel for u in corpus.train])
    assert abs(float(mels.mean())) < 0.2
    assert abs(float(mels.std()) - 1) < 0.2


def test_phonemes_lie_under_their_sound(corpus):
    """The per-phoneme mean explains the mel best at no shift."""

    def explained(shift):
        pairs = [(u.mel, u.phonemes.roll(shift)) for u in corpus.train]
        mel = torch.cat([m[8:-8] for m, _ in pairs])
        phonemes = torch.cat([p[8:-8] for _, p in pairs])
        hot = torch.nn.functional.one_hot(phonemes, len(corpus.symbols)).float()
        means = (hot.T @ mel) / hot.sum(0).clamp(min=1)[:, None]
        return 1 - float(
            (mel - means[phonemes]).square().sum() / (mel - mel.mean(0)).square().sum()
        )

    by_shift = {shift: explained(shift) for shift in (-2, -1, 0, 1, 2)}
    assert max(by_shift, key=by_shift.get) == 0
    assert by_shift[0] > 0.35


def test_resynthesis_is_near_the_truth(corpus, tmp_path):
    import soundfile

    mel = corpus.test[0].mel
    audio = griffin_lim(mel)
    again = log_mel(audio)[: len(mel)]
    assert metrics.mcd([again], [mel[: len(again)]]) < 3.0
    write_wav(tmp_path / "a.wav", audio)
    read, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == 22050
    assert len(read) == len(audio)
    assert abs(read).max() <= 1


def test_distortion_is_in_decibels(corpus):
    truth = [u.mel for u in corpus.test]
    blurred = [torch.nn.functional.avg_pool1d(m[:, None], 5, 1, 2)[:, 0] for m in truth]
    natural = ([natural_log_mel(m) for m in side] for side in (blurred, truth))
    assert metrics.mcd(blurred, truth) == pytest.approx(imf_kernels.metrics.mcd(*natural))
    assert metrics.mcd(truth, truth) == 0


def test_batches_carry_prompts_and_masks(corpus):
    generator = torch.Generator().manual_seed(0)
    batch = next(training_batches(corpus.train, 8, generator, CPU))
    prompted = batch.conditions["prompt"].abs().sum(-1) > 0
    assert not (prompted & batch.loss_mask).any()
    assert torch.equal(batch.loss_mask | prompted, batch.valid())
    drawn = torch.stack([random_prompts(corpus.train, generator) for _ in range(50)]).float()
    lengths = torch.tensor([len(u.mel) for u in corpus.train])
    assert float((drawn / lengths).max()) <= MAX_PROMPT
    assert 0.4 < float((drawn == 0).float().mean()) < 0.6


def test_shipped_teacher(teacher, tmp_path):
    assert TEACHER.stat().st_size <= 6_000_000
    assert teacher.symbols[0] == "_"
    assert not teacher.training
    save_teacher(teacher, tmp_path / "again.safetensors")
    again = load_teacher(tmp_path / "again.safetensors")
    for name, value in again.state_dict().items():
        assert torch.equal(value, teacher.state_dict()[name])


def test_student_lives_where_the_teacher_does(teacher):
    student = copy.deepcopy(teacher).to("meta").student()
    assert {p.device.type for p in student.parameters()} == {"meta"}
    trained = {name.split(".")[0] for name, p in student.named_parameters() if p.requires_grad}
    assert trained == {"estimator"}


def test_teacher_speaks(corpus, teacher):
    """Four guided steps from noise are nearer to the truth than any mean could be."""
    split = Split(corpus.test, 0, CPU)
    mels = split.solve(teacher, grids.uniform(4), experiment.GUIDANCE)
    assert all(m.shape == u.mel.shape for m, u in zip(mels, split.utterances, strict=True))
    for mel, prompt, u in zip(mels, split.prompts, split.utterances, strict=True):
        assert torch.equal(mel[:prompt], u.mel[:prompt])
    mean = torch.cat([u.mel for u in corpus.train]).mean(0)
    flat = [mean.expand(len(m), -1) for m in split.truth]
    assert metrics.mcd(split.scored(mels), split.truth) < 0.5 * metrics.mcd(flat, split.truth)


GOOD = {
    "frechet": 1.0,
    "sharpness": 0.9,
    "c2st": 0.55,
    "to_teacher": 0.1,
    "seconds_per_audio_second": 0.1,
}
POOR = {
    "frechet": 1.0,
    "sharpness": 0.5,
    "c2st": 0.7,
    "to_teacher": 0.3,
    "seconds_per_audio_second": 0.2,
}


def claimed(**student):
    """The claims about a good student at NFE 1 but for `student`, beside a poor teacher."""
    models = {"teacher": POOR, "teacher_unguided": POOR, "student": GOOD}
    rows = [
        {"model": model, "nfe": nfe, "grid": "uniform", **values}
        for model, values in models.items()
        for nfe in (32, 8, 4, 3, 2, 1)
    ]
    rows[-1].update(student)
    return {claim["claim"]: claim["holds"] for claim in experiment.claims(rows)}


def test_claims_hold_for_a_good_student():
    assert len(claimed()) == 13
    assert all(claimed().values())


@pytest.mark.parametrize(
    ("worse", "name"),
    [
        ({"to_teacher": 0.151}, "distance"),
        ({"frechet": 1.51}, "Frechet"),
        ({"c2st": 0.7}, "C2ST"),
        ({"sharpness": 0.5}, "sharpness"),
        ({"sharpness": 1.5}, "sharpness"),
        ({"seconds_per_audio_second": 0.2}, "cost"),
    ],
)
def test_claims_fail_one_by_one(worse, name):
    failed = [claim for claim, holds in claimed(**worse).items() if not holds]
    assert len(failed) == 1
    assert failed[0].startswith(name)
    assert "NFE 1" in failed[0]


@pytest.mark.timeout(600)
def test_the_whole_run(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "SENTENCES", {"train": 16, "dev": 2, "test": 3})
    out = tmp_path / "demo"
    arguments = ["--seed", "5", "--minutes", "0.1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["quickstart", *arguments])
    quickstart.main()
    results = json.loads((out / "results.json").read_text())
    assert results["seed"] == 5
    assert {"machine", "versions", "timings", "claims"} <= results.keys()
    seen = {(row["model"], row["nfe"], row["grid"]) for row in results["rows"]}
    for name, steps in (
        ("teacher", (32, 8, 4, 3, 2, 1)),
        ("teacher_unguided", (32, 8, 4, 3, 2, 1)),
        ("student", (8, 4, 3, 2, 1)),
    ):
        assert {(name, nfe, "uniform") for nfe in steps} <= seen
    assert ("student", 2, "o3s") in seen
    for row in results["rows"]:
        for key in ("mcd", "frechet", "sharpness", "c2st", "to_teacher"):
            assert row[key] == row[key] >= 0
        assert row["seconds_per_audio_second"] > 0
        assert row["times"][0] == 0
        assert row["times"][-1] == 1
    for name in ("spectrograms.png", "curves.png", "o3s.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert len(list((out / "audio").glob("*.wav"))) == 21
    page = (out / "report.html").read_text()
    assert page.count("data:audio/") == 21
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
